"""Loads a weights file into a model: converts names, stretches position tables to a longer context, loads strictly.

One loader serves our models and open_clip's. It reads published LoTLIP files, training checkpoints, CLIP weights of
open_clip and OpenAI, and weights of Long-CLIP and its derivatives.
"""

import logging
import math
import sys
from pathlib import Path

import torch
from open_clip.convert import convert_state_dict as convert_foreign_names
from open_clip.convert import load_big_vision_weights
from open_clip.model import resize_pos_embed
from torch import nn

from training.model.weights.transformers_names import is_transformers, to_open_clip
from training.model.weights.weights_file import is_big_vision, read_state_dict
from training.runtime.messages import first_line

_EMBEDDINGS = "text.transformer.embeddings."
WORD_TABLES = (_EMBEDDINGS + "word_embeddings.weight", _EMBEDDINGS + "tok_embeddings.weight")
POSITION_TABLES = ("text.positional_embedding", _EMBEDDINGS + "position_embeddings.weight")
CORNER_TABLE = "text.corner_embedding.weight"
NUM_KEPT_POSITIONS = 20  # only CLIP's first 20 positions are well trained: Long-CLIP, arXiv 2403.15378
NUM_LISTED = 4  # names of tensors shown in a message
_FLAIR_PROJECTIONS = {"image_post.proj": "visual.proj", "text_post.proj": "text_projection"}
_NAMES_TRIED = "open_clip's, OpenAI's, LoTLIP's, Long-CLIP's, FLAIR's, MobileCLIP's, transformers' CLIP's and SigLIP's"
_OTHER_SOFTWARE = "for any other model, compute features in its own software and evaluate them with --features"
_NOT_WEIGHTS = (_EMBEDDINGS + "position_ids", "text.input_resolution", "text.context_length", "text.vocab_size")


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
        model: a `LotlipCLIP`, or any open_clip model.

    Returns:
        The converted state dict.
    """
    state = to_open_clip(state) if is_transformers(state) else state
    state = {_FLAIR_PROJECTIONS.get(key, key): value for key, value in state.items()}
    state = {_below_text(key): value for key, value in convert_foreign_names(model, state).items()}
    tensors = model.state_dict()  # called only once, because it takes milliseconds
    names = {_below_text(key): key for key in tensors}
    own = {short: tensors[key] for short, key in names.items()}
    state = {key: value for key, value in state.items() if key in own or key not in _NOT_WEIGHTS}
    tail = state.pop("text.positional_embedding_res", None)
    if tail is not None:
        head = state["text.positional_embedding"]
        state["text.positional_embedding"] = torch.cat([head[:NUM_KEPT_POSITIONS], tail[NUM_KEPT_POSITIONS:]])
        extra = sorted(state.keys() - own.keys())
        if extra and own.keys() <= state.keys() | {"logit_bias", CORNER_TABLE}:
            logging.warning(f"{len(extra)} tensors outside the two towers are ignored: {', '.join(extra[:8])}")
            state = {key: value for key, value in state.items() if key in own}
    _fit_positions(state, own, model)
    for key in ("logit_scale", "logit_bias"):  # both shapes occur: [] and [1]
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    if "logit_bias" in own and "logit_bias" not in state:
        logging.warning("the weights have no logit_bias: it keeps its initial value")
        state["logit_bias"] = own["logit_bias"]
    elif "logit_bias" in state and "logit_bias" not in own:
        logging.warning("the weights' logit_bias (of a sigmoid loss) is ignored: it does not affect rankings")
        del state["logit_bias"]
    return {names.get(key, key): value for key, value in state.items()}


def _below_text(key: str) -> str:
    """Returns a key in `CustomTextCLIP`'s form: OpenAI, Long-CLIP and open_clip's `CLIP` have no ``text.`` prefix."""
    return key if key.startswith(("visual.", "text.", "logit_")) else f"text.{key}"


def _fit_positions(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Fits position tables in `state` to the model's context length and image size, in place."""
    for key in POSITION_TABLES:
        if key in state and key in own and len(state[key]) < len(own[key]):
            logging.warning(f"text positions stretched: {len(state[key])} to {len(own[key])}; not trained yet")
            offset = getattr(getattr(model, "text", None), "position_offset", 0)
            state[key] = stretch_positions(state[key], len(own[key]), NUM_KEPT_POSITIONS + offset)
    key = "visual.positional_embedding"
    if key in state and key in own and state[key].shape != own[key].shape and state[key].ndim == 2:
        rows, width = state[key].shape
        if width == own[key].shape[1] and math.isqrt(rows - 1) ** 2 == rows - 1:
            logging.warning(f"image positions interpolated: {rows - 1} to {len(own[key]) - 1}; not trained yet")
            resize_pos_embed(state, model)


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


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file into a model, strictly.

    Args:
        model: a `LotlipCLIP`, or any open_clip model.
        path: see `weights_file.read_state_dict`; for open_clip's SigLIP models also big_vision's NumPy archive.

    Raises:
        ValueError: the file can't be read, or keys are missing, unexpected or have another shape; the message names
            them and the likely reason.
    """
    if is_big_vision(path) and hasattr(getattr(model.visual, "trunk", None), "attn_pool") and hasattr(model, "text"):
        return _load_big_vision(model, path)
    state = convert_state_dict(read_state_dict(path), model)
    own = model.state_dict()
    if CORNER_TABLE in own and CORNER_TABLE not in state and "text.positional_embedding" in state:
        logging.warning(f"{path} has no corner tokens: their embeddings are random; train the model before using them")
        state[CORNER_TABLE] = own[CORNER_TABLE]
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own.keys() & state.keys()}
    reshaped = sorted(k for k, (theirs, ours) in shapes.items() if theirs != ours)
    if missing or unexpected or reshaped:
        lines = [f"{path} does not fit the model; {_likely_reason(missing, unexpected, reshaped, shapes)}:"]
        lines += _listed("missing", missing) + _listed("unexpected", unexpected)
        lines += _listed("other shape", [f"{k}: {shapes[k][0]} in the file, not {shapes[k][1]}" for k in reshaped])
        raise ValueError("\n".join(lines))
    model.load_state_dict(state, strict=True)


def _load_big_vision(model: nn.Module, path: str | Path) -> None:
    try:
        load_big_vision_weights(model, str(path))
    except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: big_vision weights of another model ({first_line(error)}); check --model") from error


def _listed(title: str, items: list[str]) -> list[str]:
    more = [f"    ... and {len(items) - NUM_LISTED:,} more"] if len(items) > NUM_LISTED else []
    return [f"  {title}: {len(items):,}", *(f"    {item}" for item in items[:NUM_LISTED]), *more] if items else []


def _likely_reason(missing: list[str], unexpected: list[str], reshaped: list[str], shapes: dict) -> str:
    for key in WORD_TABLES:
        if reshaped == [key] and not missing and not unexpected:
            (theirs, width), (ours, own_width) = shapes[key]
            if width == own_width:
                return f"it has {theirs - ours:+d} corner tokens compared with the model (--num-corner-tokens)"
    if any("visual_proj." in key for key in unexpected):
        return "it has FLAIR's weights (--model flair-ViT-B-16)"
    if unexpected == [CORNER_TABLE] or (reshaped == [CORNER_TABLE] and not missing):
        return "another number of corner tokens (--num-corner-tokens)"
    if reshaped and set(reshaped) <= set(POSITION_TABLES) and not missing and not unexpected:
        return f"another context length (--context-length {shapes[reshaped[0]][0][0]})"
    if not shapes:
        return f"wrong --model, or tensor names of another format; tried as {_NAMES_TRIED}; {_OTHER_SOFTWARE}"
    return "most likely a wrong --model"


def load_pretrained_text(text: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads a pretrained encoder's weights into a text tower; the corners keep their random embeddings.

    Args:
        text: a `CornerHFText`.
        state: result of `hf_encoders.load_pretrained_encoder`.
        name: name of the weights, for messages.

    Raises:
        ValueError: weights of another architecture.
    """
    encoder = text.transformer
    own = encoder.state_dict()
    for key in own.keys() & state.keys():
        if key.endswith(("word_embeddings.weight", "tok_embeddings.weight")):
            state[key] = torch.cat([state[key], own[key][len(state[key]) :].to(state[key].dtype)])
        elif key.endswith("position_embeddings.weight") and len(state[key]) < len(own[key]):
            state[key] = stretch_positions(state[key], len(own[key]), NUM_KEPT_POSITIONS + text.position_offset)
    _load_all(encoder, state, f"pretrained text weights {name}")


def load_pretrained_image(trunk: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads timm weights into an image tower's trunk, ignoring the classifier.

    Args:
        trunk: any timm model.
        state: name -> tensor, with timm's names.
        name: name of the weights, for messages.

    Raises:
        ValueError: weights of another architecture.
    """
    own = trunk.state_dict()
    # timm's own conversion, which also fits position tables to another image size.
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    heads = ("head", "fc", "classifier", *([classifier] if isinstance(classifier, str) else classifier))
    state = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
    try:
        state = convert(state, trunk) if convert else state
    except (RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"{name}: not weights of {type(trunk).__name__} ({first_line(error)})") from error
    if not own.keys() & state.keys():
        state = _renamed_in_order(state, own, name)
    _load_all(trunk, state, f"pretrained image weights {name}")


def _renamed_in_order(
    state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """Renames weights of the same architecture from other software by matching the tensors in order.

    Both sides list the layers in the order of computation. The last part of each name (weight, running_mean, ...) and
    each shape must agree; a classifier may follow.

    Returns:
        The renamed weights, or `state` itself if the tensors do not match.
    """
    theirs = list(state.items())[: len(own)]
    kind = [(key.rpartition(".")[2], value.shape) for key, value in own.items()]
    if len(state) - len(own) in (0, 2) and [(key.rpartition(".")[2], value.shape) for key, value in theirs] == kind:
        logging.warning(f"{name}: unknown names ({theirs[0][0]}, ...); its {len(own)} tensors match the tower in order")
        return {key: value for key, (_, value) in zip(own, theirs)}
    return state


def _load_all(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    own = module.state_dict()
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape] + sorted(state.keys() - own.keys())
    if wrong:
        raise ValueError(f"{what}: another architecture; {len(wrong)} keys do not fit, first {', '.join(wrong[:3])}")
    module.load_state_dict(state)
