"""LoTLIP: long text-image pre-training and retrieval on top of open_clip.

An import adds our model names to open_clip's list; `create_model_and_transforms`, `create_model` and `get_tokenizer`
are drop-in for open_clip's functions of the same names.
"""

import sys

__all__ = ["create_model", "create_model_and_transforms", "get_tokenizer", "save_pretrained"]


def __getattr__(name: str):
    if name in __all__:
        from training import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# `python -m training.main --help` imports this package first, and must not wait seconds for open_clip.
if sys.argv[:1] != ["-m"]:
    from training.api import create_model, create_model_and_transforms, get_tokenizer, save_pretrained
