"""Exports a model's tokenizer as transformers' files, including ``tokenizer.json``.

The tokenizer's template inserts corner tokens, and its normaliser inserts BERT's [SEP] between sentences. The only step
that is not exported is the cleaning of text before: broken encodings (ftfy) and HTML entities.
"""

from pathlib import Path

import open_clip
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.export.source import Source
from training.model.tokenizers.corner_tokenizers import CornerCLIPTokenizer, CornerHFTokenizer
from training.model.tokenizers.folder_tokenizer import FolderTokenizer

_ENDS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's name -> transformers'


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


def _clip(tokenizer: open_clip.SimpleTokenizer | CornerCLIPTokenizer, length: int) -> PreTrainedTokenizerBase:
    own = getattr(tokenizer, "tokenizer", tokenizer)
    merges = [pair for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    vocabulary = {_ENDS.get(word, word): number for word, number in own.encoder.items()}
    result = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    corners = [f"[Corner{number}]" for number in range(getattr(tokenizer, "num_corners", 0))]
    if not corners:
        return result
    result.add_tokens(corners, special_tokens=True)
    start, end = _ENDS.values()
    backend = result.backend_tokenizer
    tokens = [(word, backend.token_to_id(word)) for word in (start, *corners, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([start, "$A", *corners, end]), special_tokens=tokens
    )
    # The tower searches for the end token's id, so padding needs another id.
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!", "model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _with_corners(tokenizer: CornerHFTokenizer, length: int) -> PreTrainedTokenizerBase:
    hugging_face = tokenizer.tokenizer
    backend = Tokenizer.from_str(hugging_face.backend_tokenizer.to_str())
    start, end = (hugging_face.cls_token or hugging_face.bos_token), (hugging_face.sep_token or hugging_face.eos_token)
    corners = [f"[Corner{number}]" for number in range(tokenizer.num_corners)]
    if tokenizer.separator:
        # normalized=True: otherwise the separator is searched before the normaliser has inserted it.
        backend.add_special_tokens([AddedToken(tokenizer.separator, normalized=True, special=True)])
        join = normalizers.Replace(". ", tokenizer.separator)
        backend.normalizer = normalizers.Sequence([join, *([backend.normalizer] if backend.normalizer else [])])
    tokens = [(word, backend.token_to_id(word)) for word in (start, *corners, end)]
    single = " ".join([start, *corners, "$A", end])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    names = {"cls_token": start, "sep_token": end, "pad_token": hugging_face.pad_token}
    names |= {"unk_token": hugging_face.unk_token, "mask_token": hugging_face.mask_token, "model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
