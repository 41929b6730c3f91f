"""Tokenizers that insert corner tokens, for Hugging Face text towers and for CLIP's own.

Both are called like open_clip's, ``tokenizer(texts) -> [n, context_length]``, and never change the caller's list.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text, get_clean_fn
from transformers import AutoTokenizer

from training.model.names.files import downloading
from training.model.names.transformers_clip import HF
from training.runtime.messages import first_line

_WORD_STARTS = ("\u0120", "\u2581")  # RoBERTa and XLM-R mark the start of words, BERT their continuation (##)


class _CornerTokenizer:
    """Base of both tokenizers: truncation, padding, and counting of tokens."""

    context_length: int
    num_corners: int
    num_behind: int  # number of special and corner tokens after the words
    pad_id: int
    tokenizer: Any
    corner_ids: list[int]
    pooled_token: str  # name of the token whose feature the tower returns

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None, padding: bool = True
    ) -> torch.Tensor | list[list[int]]:
        """Tokenises one or several texts.

        Args:
            texts: one text or several; not changed.
            context_length: maximum number of tokens per text; None uses the tokenizer's own.
            padding: pad to the context length.

        Returns:
            [n, context_length] int64; without padding, a list of n lists of ids.
        """
        length = context_length or self.context_length
        sequences = self.encode([texts] if isinstance(texts, str) else list(texts))
        return self.cut(sequences, length, padding)

    def cut(self, sequences: list[list[int]], length: int, padding: bool = True) -> torch.Tensor | list[list[int]]:
        """Truncates the words of each text, but keeps the special and corner tokens behind them; see `__call__`."""
        behind = self.num_behind
        short = [ids if len(ids) <= length else ids[: length - behind] + ids[-behind:] for ids in sequences]
        if not padding:
            return short
        padded = torch.full((len(short), length), self.pad_id, dtype=torch.int64)
        for ids, row in zip(short, padded):
            row[: len(ids)] = torch.tensor(ids)
        return padded

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Returns the number of tokens of each text before truncation, special and corner tokens included."""
        return [len(ids) for ids in self.encode(texts)]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, special and corner tokens included, before truncation."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> list[tuple[str, list[int]]]:
        """Joins the word pieces of one caption into words.

        Returns:
            Each word with the positions of its pieces, without special tokens, corners and padding.
        """
        words: list[tuple[str, list[int]]] = []
        for position, piece, begins_word in self._pieces(ids):
            if begins_word or not words or words[-1][1][-1] != position - 1:
                words.append((piece, [position]))
            else:
                words[-1] = (words[-1][0] + piece, [*words[-1][1], position])
        return words

    def _pieces(self, ids: list[int]) -> Iterator[tuple[int, str, bool]]:
        """Yields position and text of each word piece, and whether it begins a word."""
        raise NotImplementedError


class CornerHFTokenizer(_CornerTokenizer):
    """A Hugging Face tokenizer with the layout ``[CLS] [Corner0] ... w w [SEP] w w [SEP] [PAD] ...``.

    If the vocabulary has a [SEP] (BERT), a text is split at every full stop followed by a space, and the sentences are
    joined by [SEP]. With RoBERTa and XLM-R, whose ``</s>`` marks the end of a text, the text is not split.

    Args:
        source: folder or hub name.
        context_length: default maximum number of tokens.
        num_corners: m.
        cache_dir: folder for downloads.

    Raises:
        FileNotFoundError: the tokenizer is neither on this machine nor on the hub.

    Source: LoTLIP (arXiv 2410.05249); the ids equal those of the published tokenizer.
    """

    num_behind = 1
    pooled_token = "[CLS]"

    def __init__(
        self, source: str | Path, context_length: int = 128, num_corners: int = 0, cache_dir: str | None = None
    ):
        with downloading(f"hf_tokenizer_name {source}", cache_dir):
            self.tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
        self.context_length, self.num_corners = context_length, num_corners
        names = [f"[Corner{i}]" for i in range(num_corners)]
        self.tokenizer.add_tokens(names, special_tokens=True)
        self.corner_ids = self.tokenizer.convert_tokens_to_ids(names)
        self.pad_id = self.tokenizer.pad_token_id
        self.separator = "[SEP]" if self.tokenizer.sep_token == "[SEP]" else None
        self._clean = get_clean_fn("whitespace")  # ftfy, unescape HTML twice, strip, collapse whitespace

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.separator:
            texts = [self.separator.join(text.split(". ")) for text in texts]
        texts = [self._clean(text) for text in texts]
        # Not verbose: `tokenise_and_count_lost` counts truncation, so transformers' own warning is noise.
        sequences = self.tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
        return [ids[:1] + self.corner_ids + ids[1:] for ids in sequences]

    def _pieces(self, ids: list[int]) -> Iterator[tuple[int, str, bool]]:
        special, pieces = set(self.tokenizer.all_special_ids), self.tokenizer.convert_ids_to_tokens(ids)
        marks_starts = any(piece.startswith(_WORD_STARTS) for piece in pieces)
        for position, (number, piece) in enumerate(zip(ids, pieces)):
            if number in special or number in self.corner_ids:
                continue
            if marks_starts:
                yield position, piece.lstrip("".join(_WORD_STARTS)), piece.startswith(_WORD_STARTS)
            else:
                yield position, piece.removeprefix("##"), not piece.startswith("##")

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, corner tokens included."""
        self.tokenizer.save_pretrained(str(folder))


class CornerCLIPTokenizer(_CornerTokenizer):
    """CLIP's tokenizer with the layout ``[SOT] w w ... [Corner0] ... [EOT] 0 ...``; corner ids follow CLIP's own.

    Args:
        context_length: default maximum number of tokens.
        num_corners: m.
    """

    pad_id = 0
    pooled_token = "[EOT]"

    def __init__(self, context_length: int = 77, num_corners: int = 0):
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.context_length, self.num_corners, self.num_behind = context_length, num_corners, num_corners + 1
        self.corner_ids = [self.tokenizer.vocab_size + number for number in range(num_corners)]

    def encode(self, texts: list[str]) -> list[list[int]]:
        start, end = [self.tokenizer.sot_token_id], [*self.corner_ids, self.tokenizer.eot_token_id]
        return [start + self.tokenizer.encode(text) + end for text in texts]

    def _pieces(self, ids: list[int]) -> Iterator[tuple[int, str, bool]]:
        begins_word = True
        for position, number in enumerate(ids):
            if number == self.tokenizer.eot_token_id:
                break
            if number < self.tokenizer.sot_token_id:
                piece = self.tokenizer.decoder[number]
                yield position, piece.removesuffix("</w>"), begins_word
                begins_word = piece.endswith("</w>")


class FolderTokenizer(HFTokenizer):
    """The tokenizer of a folder in transformers' format; unlike open_clip's, it does not change the texts first.

    Args:
        folder: folder with tokenizer files.
        context_length: number of tokens to which texts are truncated and padded.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, context_length: int):
        try:
            super().__init__(str(folder), context_length, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise FileNotFoundError(
                f"--model {HF}{folder}: no tokenizer in this folder ({first_line(error)})"
            ) from error
        self.clean_fn = str


def count_tokens(tokenizer: Callable, texts: list[str]) -> list[int]:
    """Counts the tokens of each text before truncation, special tokens included.

    Args:
        tokenizer: an open_clip tokenizer, or any object with a method `count_tokens(texts)`.
        texts: any number of captions.

    Raises:
        TypeError: another kind of tokenizer.
    """
    if hasattr(tokenizer, "count_tokens"):
        return tokenizer.count_tokens(texts)
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) + 2 for text in texts]  # + start and end of text
    if isinstance(tokenizer, HFTokenizer):
        texts = [tokenizer.clean_fn(text) for text in texts]
        class_token = tokenizer.tokenizer_mode == "clips"  # this mode appends a class token
    elif isinstance(tokenizer, SigLipTokenizer):
        texts, class_token = [canonicalize_text(basic_clean(text)) for text in texts], False
    else:
        raise TypeError(f"can't count the tokens of a {type(tokenizer).__name__}")
    sequences = tokenizer.tokenizer(texts, truncation=False, verbose=False).input_ids if texts else []
    return [len(ids) + class_token for ids in sequences]


def tokenise_and_count_lost(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Returns token ids [n, context_length], and for each text the number of tokens beyond these; 0 if it fits.

    Raises:
        TypeError: see `count_tokens`.
    """
    if isinstance(tokenizer, _CornerTokenizer):  # tokenises only once
        sequences, length = tokenizer.encode(texts), tokenizer.context_length
        return torch.as_tensor(tokenizer.cut(sequences, length)), [max(0, len(ids) - length) for ids in sequences]
    return tokenizer(texts), [max(0, length - tokenizer.context_length) for length in count_tokens(tokenizer, texts)]
