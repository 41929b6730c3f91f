"""Flags of the model as arguments of the functions that make it."""

from collections.abc import Mapping
from typing import Any

AUTO = "auto"
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")
# Flags that are arguments of `create_model_and_transforms`; `get_tokenizer` takes the first ones.
OF_TOKENIZER = ("cache_dir", "num_corner_tokens", "context_length", "force_context_length")
OF_MODEL = (
    *("force_image_size", "force_patch_dropout", "force_quick_gelu", "force_custom_text"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


def tokenizer_arguments(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `get_tokenizer` that the flags set; flags that are not in the mapping are left out."""
    return {name: flags[name] for name in OF_TOKENIZER if name in flags}


def model_arguments(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `create_model_and_transforms` with which the flags change a model or its preprocessing.

    Args:
        flags: by their names in the namespace; the ``params.json`` of an earlier version may lack some.
    """
    changes = {name: flags[name] for name in OF_MODEL if flags.get(name) not in (None, False)}
    if len(size := changes.get("force_image_size", ())) == 1:
        changes["force_image_size"] = size[0]
    changes |= {name: 3 * changes[name] for name in ("image_mean", "image_std") if len(changes.get(name, ())) == 1}
    return tokenizer_arguments(flags) | changes
