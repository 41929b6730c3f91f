"""Counts how many tokens captions have and how many of them a tokenizer cuts off, for any open_clip tokenizer."""

from collections.abc import Callable

import torch
from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text


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


def tokenise_and_count_lost(tokenizer: Callable, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Returns token ids [n, context_length], and for each text the number of tokens beyond these; 0 if it fits.

    Raises:
        TypeError: see `count_tokens`.
    """
    if hasattr(tokenizer, "tokenise_and_count_lost"):  # ours tokenise only once
        return tokenizer.tokenise_and_count_lost(texts)
    return tokenizer(texts), [max(0, length - tokenizer.context_length) for length in count_tokens(tokenizer, texts)]
