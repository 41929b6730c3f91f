"""Tokenizers that put corner tokens in: for Hugging Face text towers and for CLIP's own.

Both are called as open_clip's are, ``tokenizer(texts) -> [n, context_length]``, and never change the caller's list.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from open_clip import SimpleTokenizer
from open_clip.tokenizer import get_clean_fn
from transformers import AutoTokenizer

from training.model.config import ModelSpec, find_pretrained_folder, not_found

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "tokenizer_config.json")


class _CornerTokenizer:
    """What both tokenizers share: one or many texts, padded or not, and how much did not fit."""

    context_length: int
    num_corners: int
    num_behind: int  # special and corner tokens behind the words
    pad_id: int

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None, padding: bool = True
    ) -> torch.Tensor | list[list[int]]:
        """Tokenises.

        Args:
            texts: one text or several; not changed.
            context_length: longest result; None takes the tokenizer's own.
            padding: fill up to the context length.

        Returns:
            [n, context_length] int64, or without padding a list of n lists of ids.
        """
        length = context_length or self.context_length
        rows = [self._cut(row, length) for row in self._encode([texts] if isinstance(texts, str) else list(texts))]
        return self._pad(rows, length) if padding else rows

    def tokenise_and_count_lost(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """Returns what a call returns, and what `count_lost_tokens` does, of one look at the texts."""
        rows, length = self._encode(list(texts)), self.context_length
        return self._pad([self._cut(row, length) for row in rows], length), self._lost(map(len, rows))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text, special and corner tokens included, however many."""
        return [len(row) for row in self._encode(list(texts))]

    def count_lost_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns for each text the number of tokens that do not fit the context length; 0 if it fits."""
        return self._lost(self.count_tokens(texts))

    def _lost(self, lengths: Iterable[int]) -> list[int]:
        return [max(0, length - self.context_length) for length in lengths]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids with special and corner tokens, however many."""
        raise NotImplementedError

    def _cut(self, row: list[int], length: int) -> list[int]:
        """Leaves out words at the end; the tokens behind them stay."""
        return row if len(row) <= length else row[: length - self.num_behind] + row[-self.num_behind :]

    def _pad(self, rows: list[list[int]], length: int) -> torch.Tensor:
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        for row, target in zip(rows, ids):
            target[: len(row)] = torch.tensor(row)
        return ids


class CornerHFTokenizer(_CornerTokenizer):
    """A Hugging Face tokenizer; layout ``[CLS] [Corner0] .. w w [SEP] w w [SEP] [PAD] ..``

    Where the vocabulary has a [SEP] of its own (BERT's), a text is split at every full stop and space, and the parts
    are joined by [SEP]; RoBERTa's and XLM-R's ``</s>`` ends a text, so theirs stay whole.

    Args:
        source: folder or hub name.
        context_length: default length of a row.
        num_corners: m.
        cache_dir: where downloads are kept.

    Raises:
        FileNotFoundError: no such tokenizer here or on the hub.

    Source: LoTLIP (arXiv 2410.05249); ids equal to the published tokenizer's.
    """

    def __init__(
        self, source: str | Path, context_length: int = 128, num_corners: int = 0, cache_dir: str | None = None
    ):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"hf_tokenizer_name {source}: {not_found(cache_dir, error)}; "
                f"put its folder (tokenizer.json, ..) below --cache-dir DIR"
            ) from error
        self.context_length = context_length
        self.num_corners = num_corners
        self.num_behind = 1
        names = [f"[Corner{i}]" for i in range(num_corners)]
        self.tokenizer.add_tokens(names, special_tokens=True)
        self.corner_ids = self.tokenizer.convert_tokens_to_ids(names)
        self.pad_id = self.tokenizer.pad_token_id
        self.separator = "[SEP]" if self.tokenizer.sep_token == "[SEP]" else None
        self._clean = get_clean_fn("whitespace")  # ftfy, unescape HTML twice, strip, single spaces
        logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_not_about_length)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.separator:
            texts = [self.separator.join(text.split(". ")) for text in texts]
        texts = [self._clean(text) for text in texts]
        rows = self.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False).input_ids
        return [row[:1] + self.corner_ids + row[1:] for row in rows]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, corner tokens included."""
        self.tokenizer.save_pretrained(str(folder))


def _is_not_about_length(record: logging.LogRecord) -> bool:
    return "longer than the specified maximum" not in record.getMessage()  # counting what is cut is our business


class CornerCLIPTokenizer(_CornerTokenizer):
    """CLIP's tokenizer; layout ``[SOT] w w .. [Corner0] .. [EOT] 0 ..``, corner ids after CLIP's own.

    Args:
        context_length: default length of a row.
        num_corners: m.
    """

    def __init__(self, context_length: int = 77, num_corners: int = 0):
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.num_corners = num_corners
        self.num_behind = num_corners + 1
        first = self.tokenizer.vocab_size
        self.corner_ids = list(range(first, first + num_corners))
        self.pad_id = 0

    def _encode(self, texts: list[str]) -> list[list[int]]:
        start, end = [self.tokenizer.sot_token_id], [*self.corner_ids, self.tokenizer.eot_token_id]
        return [start + self.tokenizer.encode(text) + end for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Does nothing: open_clip brings CLIP's vocabulary."""


def create_tokenizer(spec: ModelSpec, cache_dir: str | None = None) -> CornerHFTokenizer | CornerCLIPTokenizer:
    """Returns the tokenizer of one of our models: from the model's own folder if it holds one, else by its name."""
    name = spec.text_cfg.get("hf_tokenizer_name")
    if not name:
        return CornerCLIPTokenizer(spec.context_length, spec.num_corners)
    if spec.folder and any((spec.folder / file).is_file() for file in TOKENIZER_FILES):
        source = spec.folder
    else:
        source = find_pretrained_folder(name, cache_dir) or name
    return CornerHFTokenizer(source, spec.context_length, spec.num_corners, cache_dir)
