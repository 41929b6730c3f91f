"""LoTLIP: long text-image pre-training and retrieval on top of open_clip.

`create_model_and_transforms`, `create_model` and `get_tokenizer` replace open_clip's functions of the same names.
`register_model_configs` adds our model names to open_clip's own list. Everything is imported on first use.
"""

import importlib

_HOMES = {
    "Experiment": "training.runtime.experiment",
    "create_model": "training.model.assembly.factory",
    "create_model_and_transforms": "training.model.assembly.factory",
    "get_tokenizer": "training.model.assembly.factory",
    "register_model_configs": "training.model.names.config",
    "save_pretrained": "training.model.assembly.factory",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
