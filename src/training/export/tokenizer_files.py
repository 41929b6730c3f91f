"""Exports a model's tokenizer as transformers' files, including ``tokenizer.json``.

The tokenizer's template inserts corner tokens. Its normaliser inserts BERT's [SEP] between sentences, and replaces the
characters that open_clip's cleaning replaces. Its repair of broken encodings and of HTML entities is not exported.
"""

import unicodedata
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import basic_clean
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.export.source import Source
from training.model.tokenizers import CornerCLIPTokenizer, CornerHFTokenizer, FolderTokenizer

_START, _END = "<start_of_text>", "<end_of_text>"


def write_tokenizer(source: Source, folder: Path) -> PreTrainedTokenizerBase:
    """Writes the tokenizer's files; returns the tokenizer that transformers loads from them.

    Raises:
        ValueError: the tokenizer has no counterpart in transformers.
    """
    tokenizer = source.tokenizer
    length = tokenizer.context_length
    if isinstance(tokenizer, FolderTokenizer):
        result = tokenizer.tokenizer
        result.model_max_length = length
    elif isinstance(tokenizer, (open_clip.SimpleTokenizer, CornerCLIPTokenizer)):
        result = _clip(tokenizer, length)
    elif isinstance(tokenizer, CornerHFTokenizer):
        result = _with_corners(tokenizer, length)
    else:
        raise ValueError(
            f"the tokenizer of this model, a {type(tokenizer).__name__}, has no counterpart in transformers"
        )
    result.save_pretrained(folder)
    return type(result).from_pretrained(folder)


def _cleaning() -> list[normalizers.Normalizer]:
    """Returns what open_clip's cleaning does to characters: curly quotes, ligatures, wide and half-width forms."""
    characters = [chr(number) for number in (*range(0xA0, 0xD800), *range(0xE000, 0x10000))]
    found = [(old, basic_clean(old)) for old in characters]
    changed = [(old, new) for old, new in found if new and new != unicodedata.normalize("NFC", old)]
    return [normalizers.NFC(), *(normalizers.Replace(old, new) for old, new in changed)]


def _clip(tokenizer: open_clip.SimpleTokenizer | CornerCLIPTokenizer, length: int) -> PreTrainedTokenizerBase:
    words: Any = getattr(tokenizer, "tokenizer", tokenizer)
    merges = [pair for pair, _ in sorted(words.bpe_ranks.items(), key=lambda item: item[1])]
    # Corner tokens are ordinary entries of the vocabulary, so that one that is written in a text is only text.
    corners = {f"[Corner{n}]": number for n, number in enumerate(getattr(tokenizer, "corner_ids", ()))}
    names: dict[str, Any] = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "model_max_length": length}
    backend = CLIPTokenizer(vocab=words.encoder | corners, merges=merges, pad_token=_END, **names).backend_tokenizer
    backend.normalizer = normalizers.Sequence([*_cleaning(), backend.normalizer])
    if not corners:
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_END, **names)
    tokens = [(word, backend.token_to_id(word)) for word in (_START, *corners, _END)]
    single = " ".join([_START, "$A", *corners, _END])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    # The tower searches for the end token's id, and 0 is the id of "!". No token attends to one behind the end.
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_START, **names)


def _with_corners(tokenizer: CornerHFTokenizer, length: int) -> PreTrainedTokenizerBase:
    hugging_face = tokenizer.tokenizer
    backend = Tokenizer.from_str(hugging_face.backend_tokenizer.to_str())
    start, end = (hugging_face.cls_token or hugging_face.bos_token), (hugging_face.sep_token or hugging_face.eos_token)
    corners = [f"[Corner{number}]" for number in range(tokenizer.num_corners)]
    if tokenizer.separator:
        # normalized=True: otherwise the separator is searched before the normaliser has inserted it.
        backend.add_special_tokens([AddedToken(tokenizer.separator, normalized=True, special=True)])
    join = [normalizers.Replace(". ", tokenizer.separator)] if tokenizer.separator else []
    rest = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([*join, *_cleaning(), *rest])
    tokens = [(word, backend.token_to_id(word)) for word in (start, *corners, end)]
    single = " ".join([start, *corners, "$A", end])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    names = {"cls_token": start, "sep_token": end, "pad_token": hugging_face.pad_token}
    names |= {"unk_token": hugging_face.unk_token, "mask_token": hugging_face.mask_token, "model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
