"""Loads a weights file into a model: converts names, stretches position tables to a longer context, loads strictly.

One loader serves our models and open_clip's. It reads published LoTLIP files, training checkpoints, CLIP weights of
open_clip and OpenAI, and weights of Long-CLIP and its derivatives.
"""

import logging
import math
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict as convert_foreign_names
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from training.model.weights.transformers_names import to_open_clip
from training.model.weights.weights_file import read_state_dict
from training.runtime.messages import first_line

# Ends of names.
WORD_TABLES = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
POSITION_TABLES = ("positional_embedding", "embeddings.position_embeddings.weight")
CORNER_TABLE = "text.corner_embedding.weight"
NUM_KEPT_POSITIONS = 20  # only CLIP's first 20 positions are well trained: Long-CLIP, arXiv 2403.15378
_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)
NUM_LISTED = 4  # names of tensors shown in a message
_FLAIR_PROJECTIONS = {"image_post.proj": "visual.proj", "text_post.proj": "text_projection"}
_NOTHING_KNOWN = (
    "wrong --model, or tensor names of another format; tried as open_clip's, OpenAI's, LoTLIP's, Long-CLIP's, FLAIR's, "
    "MobileCLIP's, transformers' CLIP's and SigLIP's; for any other model, compute features in its own software and "
    "evaluate them with --features"
)
_NOT_WEIGHTS = "position_ids", "input_resolution", "context_length", "vocab_size"  # of BERT and of OpenAI's archives


def convert_state_dict(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Converts weights of other software to a model's names and shapes; the strict load reports unknown keys later.

    - MobileCLIP's names and transformers' names become open_clip's;
    - FLAIR's projections get CLIP's names;
    - text keys move below ``text.`` or to the top level, whichever the model uses;
    - Long-CLIP's two position tables become one: rows 0..19 of the first, the remaining rows of the second. Additional
      heads in such a file (HiMo-CLIP, DeBias-CLIP) are dropped with a warning that names them;
    - a text position table that is shorter than the model's is stretched; an image position table for another image
      size is interpolated;
    - a logit_bias that the model does not have is dropped; a logit_bias that the file lacks keeps its initial value.

    Args:
        state: result of `weights_file.read_state_dict`; not changed.
        model: one of our models, or of open_clip's.

    Returns:
        The converted state dict.
    """
    ours = model.state_dict()
    if any(key.startswith(("text_model.", "vision_model.")) for key in state):
        state = to_open_clip(state)
    state = convert_foreign_names(model, {_FLAIR_PROJECTIONS.get(key, key): value for key, value in state.items()})
    state = {_text_key(key, ours): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in ours or key.split(".")[-1] not in _NOT_WEIGHTS}
    if tails := [key for key in state if key.endswith("positional_embedding_res")]:
        tail, key = state.pop(tails[0]), _text_key(tails[0].removesuffix("_res"), ours)
        state[key] = torch.cat([state[key][:NUM_KEPT_POSITIONS], tail[NUM_KEPT_POSITIONS:]])
        extra = sorted(state.keys() - ours.keys())
        if extra and ours.keys() <= state.keys() | {"logit_bias", CORNER_TABLE}:
            logging.warning(f"{len(extra)} tensors outside the two towers are ignored: {', '.join(extra[:8])}")
            state = {key: value for key, value in state.items() if key in ours}
    _stretch_text_positions(state, ours, getattr(getattr(model, "text", None), "position_offset", 0))
    theirs, wanted = (len(tables.get("visual.positional_embedding", ())) - 1 for tables in (state, ours))
    if 0 < wanted != theirs and math.isqrt(max(0, theirs)) ** 2 == theirs:
        logging.warning(f"image positions interpolated: {theirs} to {wanted}; not trained yet")
        resize_pos_embed(state, model)
    if "logit_bias" in ours and "logit_bias" not in state:
        logging.warning("the weights have no logit_bias: it keeps its initial value")
        state["logit_bias"] = ours["logit_bias"]
    elif "logit_bias" in state and "logit_bias" not in ours:
        logging.warning("the weights' logit_bias (of a sigmoid loss) is ignored: it does not affect rankings")
        del state["logit_bias"]
    scalars = {key: state[key].reshape_as(ours[key]) for key in state if key.startswith("logit_") and key in ours}
    return state | scalars  # both shapes occur: [] and [1]


def _text_key(key: str, ours: Container[str]) -> str:
    """Returns a key below ``text.`` or at the top level, whichever the model has; open_clip has both forms."""
    return next((name for name in (f"text.{key}", key.removeprefix("text.")) if name in ours), key)


def _stretch_text_positions(state: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], offset: int) -> None:
    """Stretches shorter text position tables to those of the model, in place; `offset` rows belong to no token."""
    for key in ours.keys() & state.keys():
        is_text = key.endswith(POSITION_TABLES) and not key.startswith("visual.")
        if is_text and len(state[key]) < len(ours[key]):
            logging.warning(f"text positions stretched: {len(state[key])} to {len(ours[key])}; not trained yet")
            state[key] = stretch_positions(state[key], len(ours[key]), NUM_KEPT_POSITIONS + offset)


def stretch_positions(table: torch.Tensor, num_rows: int, num_kept: int = NUM_KEPT_POSITIONS) -> torch.Tensor:
    """Lengthens a position table: keeps the first rows and interpolates the others linearly between their end points.

    Args:
        table: [rows, width].
        num_rows: new number of rows, at least `rows`.
        num_kept: number of rows at the start that are kept.

    Returns:
        [num_rows, width], in the table's dtype.

    Source: Long-CLIP (arXiv 2403.15378), knowledge-preserved stretching.
    """
    head, tail = table[:num_kept], table[num_kept:]
    stretched = nn.functional.interpolate(
        tail.T[None].float(), size=num_rows - num_kept, mode="linear", align_corners=True
    )
    return torch.cat([head, stretched[0].T.to(table.dtype)])


class WithoutDraws(TorchFunctionMode):
    """Context in which weights are not drawn, because all of them are loaded afterwards."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_weights(model: nn.Module, path: str | Path, positions_as_open_clip: bool = False) -> None:
    """Loads a file into a model, strictly.

    Args:
        model: one of our models, or of open_clip's.
        path: see `weights_file.read_state_dict`.
        positions_as_open_clip: interpolate all text positions for another context length, without keeping the first.

    Raises:
        ValueError: the file can't be read, or keys are missing, unexpected or have another shape; the message names
            them and the likely reason.
    """
    state, ours = read_state_dict(path), model.state_dict()
    if positions_as_open_clip:
        resize_text_pos_embed(state, model)
    state = convert_state_dict(state, model)
    if CORNER_TABLE in ours and CORNER_TABLE not in state and "text.positional_embedding" in state:
        logging.warning(f"{path} has no corner tokens: their embeddings are random; train the model before using them")
        state[CORNER_TABLE] = ours[CORNER_TABLE]
    _load_strictly(model, state, str(path))


def _load_strictly(module: nn.Module, state: dict[str, torch.Tensor], what: str, reason: str = "") -> None:
    """Loads weights; raises ValueError with the keys that do not fit, and the reason, or the most likely one."""
    ours = module.state_dict()
    missing, unexpected = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    both = {key: (tuple(state[key].shape), tuple(ours[key].shape)) for key in sorted(ours.keys() & state.keys())}
    reshaped = {key: shapes for key, shapes in both.items() if shapes[0] != shapes[1]}
    if missing or unexpected or reshaped:
        reason = reason or (_likely_reason(missing, unexpected, reshaped) if both else _NOTHING_KNOWN)
        shapes = [f"{key}: {theirs} in the file, not {wanted}" for key, (theirs, wanted) in reshaped.items()]
        lines = [f"{what} does not fit the model; {reason}:"]
        for title, items in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
            lines += [f"  {title}: {len(items):,}"] if items else []
            lines += [f"    {item}" for item in items[:NUM_LISTED]]
            lines += [f"    ... and {len(items) - NUM_LISTED:,} more"] if len(items) > NUM_LISTED else []
        raise ValueError("\n".join(lines))
    module.load_state_dict(state)


def _likely_reason(missing: list[str], unexpected: list[str], reshaped: dict[str, tuple]) -> str:
    if any("visual_proj." in key for key in unexpected):
        return "it has FLAIR's weights (--model flair-ViT-B-16)"
    if [*reshaped, *missing, *unexpected] == [CORNER_TABLE]:
        return "another number of corner tokens (--num-corner-tokens)"
    if len(reshaped) == 1 and not missing and not unexpected:
        ((key, ((theirs, *width), (ours, *our_width))),) = reshaped.items()
        if key.endswith(WORD_TABLES) and width == our_width:
            return f"it has {theirs - ours:+d} corner tokens compared with the model (--num-corner-tokens)"
        if key.endswith(POSITION_TABLES) and not key.startswith("visual."):
            return f"another context length (--context-length {theirs})"
    return "most likely a wrong --model"


def load_pretrained_text(text: Any, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads a pretrained encoder's weights into a text tower; the corners keep their random embeddings.

    Args:
        text: a `CornerHFText`.
        state: the encoder's weights, with its own names; changed.
        name: name of the weights, for messages.

    Raises:
        ValueError: weights of another architecture.
    """
    ours = text.transformer.state_dict()
    for key in ours.keys() & state.keys():
        if key.endswith(WORD_TABLES):
            state[key] = torch.cat([state[key], ours[key][len(state[key]) :].to(state[key].dtype)])
    _stretch_text_positions(state, ours, text.position_offset)
    _load_strictly(text.transformer, state, f"pretrained text weights {name}", "another architecture")


def load_pretrained_image(trunk: Any, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads timm weights into an image tower's trunk, ignoring the classifier.

    Args:
        trunk: any timm model.
        state: name -> tensor, with timm's names.
        name: name of the weights, for messages.

    Raises:
        ValueError: weights of another architecture.
    """
    ours = trunk.state_dict()
    # timm's own conversion, which also fits position tables to another image size.
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    heads = ("head", "fc", "classifier", *([classifier] if isinstance(classifier, str) else classifier))
    state = {k: v for k, v in state.items() if k in ours or not k.startswith(heads)}
    try:
        state = convert(state, trunk) if convert else state
    except (RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"{name}: not weights of {type(trunk).__name__} ({first_line(error)})") from error
    if not ours.keys() & state.keys():
        state = _renamed_in_order(state, ours, name)
    _load_strictly(trunk, state, f"pretrained image weights {name}", "another architecture")


def _renamed_in_order(
    state: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """Renames weights of the same architecture from other software by matching the tensors in order.

    Both sides list the layers in the order of computation. The last part of each name (weight, running_mean, ...) and
    each shape must agree; a classifier may follow.

    Returns:
        The renamed weights, or `state` itself if the tensors do not match.
    """
    theirs = list(state.items())[: len(ours)]
    kinds = [[(key.rpartition(".")[2], value.shape) for key, value in side] for side in (theirs, ours.items())]
    if len(state) - len(ours) in (0, 2) and kinds[0] == kinds[1]:
        logging.warning(f"{name}: unknown names ({theirs[0][0]}, ...); {len(ours)} tensors match the tower in order")
        return {key: value for key, (_, value) in zip(ours, theirs)}
    return state
