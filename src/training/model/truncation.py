"""How much of a caption a tokenizer cuts off, for any of open_clip's tokenizers."""

from collections.abc import Callable

from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text


def count_lost_tokens(tokenizer: Callable, texts: list[str]) -> list[int]:
    """Counts the tokens of each text beyond the tokenizer's context length.

    Args:
        tokenizer: an open_clip tokenizer, or one with a method `count_lost_tokens(texts)` of its own.
        texts: any number of captions.

    Returns:
        Per text the number of tokens, special tokens included, that do not fit; 0 if it fits.

    Raises:
        TypeError: a tokenizer of another kind.
    """
    if hasattr(tokenizer, "count_lost_tokens"):
        return tokenizer.count_lost_tokens(texts)
    if isinstance(tokenizer, SimpleTokenizer):
        lengths = [len(tokenizer.encode(text)) + 2 for text in texts]  # + start and end of text
    elif isinstance(tokenizer, HFTokenizer):
        texts = [tokenizer.clean_fn(text) for text in texts]
        lengths = [len(ids) for ids in tokenizer.tokenizer(texts, truncation=False, verbose=False).input_ids]
        if tokenizer.tokenizer_mode == "clips":
            lengths = [length + 1 for length in lengths]  # its class token at the end
    elif isinstance(tokenizer, SigLipTokenizer):
        texts = [canonicalize_text(basic_clean(text)) for text in texts]
        lengths = [len(ids) for ids in tokenizer.tokenizer(texts, truncation=False, verbose=False).input_ids]
    else:
        raise TypeError(f"can't count the tokens of a {type(tokenizer).__name__}")
    return [max(0, length - tokenizer.context_length) for length in lengths]
