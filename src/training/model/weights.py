"""From a weights file to a model: read safely, converted, stretched to a longer context, loaded strictly.

Read are published LoTLIP files, training checkpoints, open_clip's and OpenAI's CLIP weights, Long-CLIP's `.pt`, and
safetensors of any of them.
"""

import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from training.runtime.messages import first_line

_EMBEDDINGS = "text.transformer.embeddings."
WORD_TABLES = (_EMBEDDINGS + "word_embeddings.weight", _EMBEDDINGS + "tok_embeddings.weight")
POSITION_TABLES = ("text.positional_embedding", _EMBEDDINGS + "position_embeddings.weight")
CORNER_TABLE = "text.corner_embedding.weight"
UNSAFE_FILE = (
    "not a file of plain tensors, and nothing else is loaded (it could run code); "
    "convert it to safetensors where you trust it"
)
NUM_KEPT_POSITIONS = 20  # CLIP's first 20 positions are well trained, the rest hardly: Long-CLIP, arXiv 2403.15378
_NOT_WEIGHTS = (_EMBEDDINGS + "position_ids", "input_resolution", "context_length", "vocab_size")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a weights file without running code from it.

    Args:
        path: safetensors, or a `.pt`/`.pth`/`.bin` file of plain tensors: a bare state dict, or a checkpoint with one
            under ``state_dict``. Prefixes of DDP and torch.compile are taken off.

    Raises:
        ValueError: the file is broken, holds more than plain tensors, or no weights.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {UNSAFE_FILE}") from error
    except (RuntimeError, SafetensorError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: broken weights file ({first_line(error)}); fetch it again") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: no weights in it; expected a state dict, or a checkpoint with 'state_dict'")
    return {_without_prefix(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def _without_prefix(key: str) -> str:
    for prefix in ("module.", "_orig_mod.", "module."):
        key = key.removeprefix(prefix)
    return key


def convert_state_dict(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Brings weights of other makes into the form of a `LotlipCLIP` model; unknown keys stay for the strict load.

    - text keys at top level (OpenAI, Long-CLIP, open_clip's `CLIP`) move below ``text.``;
    - Long-CLIP's two position tables become one: rows 0..19 of the first, the rest of the second;
    - a position table that is shorter than the model's is stretched.
    """
    state = {
        key if key.startswith(("visual.", "text.", "logit_")) else f"text.{key}": value
        for key, value in state.items()
        if key not in _NOT_WEIGHTS
    }
    tail = state.pop("text.positional_embedding_res", None)
    if tail is not None:
        head = state["text.positional_embedding"]
        state["text.positional_embedding"] = torch.cat([head[:NUM_KEPT_POSITIONS], tail[NUM_KEPT_POSITIONS:]])
    own = model.state_dict()
    for key in POSITION_TABLES:
        if key in state and key in own and len(state[key]) < len(own[key]):
            logging.warning(f"text positions stretched: {len(state[key])} to {len(own[key])}; not trained yet")
            state[key] = stretch_positions(state[key], len(own[key]), NUM_KEPT_POSITIONS + model.text.position_offset)
    for key in ("logit_scale", "logit_bias"):  # [] and [1] are both in use
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    if "logit_bias" in own and "logit_bias" not in state:
        logging.warning("the weights have no logit_bias: it starts as an untrained model's")
        state["logit_bias"] = own["logit_bias"]
    elif "logit_bias" in state and "logit_bias" not in own:
        logging.warning("logit_bias, which a pairwise sigmoid was trained with, is left out: it changes no ranking")
        del state["logit_bias"]
    return state


def stretch_positions(table: torch.Tensor, num_rows: int, num_kept: int = NUM_KEPT_POSITIONS) -> torch.Tensor:
    """Lengthens a position table: the first rows as they are, the others interpolated linearly, both ends exact.

    Args:
        table: [rows, width].
        num_rows: at least `rows`.
        num_kept: rows that do not move.

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
    """Loads a file into one of our models, strictly.

    Args:
        model: a `LotlipCLIP`.
        path: see `read_state_dict`.

    Raises:
        ValueError: keys are missing, unexpected or of another shape; the message names them and the likely reason.
    """
    state = convert_state_dict(read_state_dict(path), model)
    own = model.state_dict()
    if CORNER_TABLE in own and CORNER_TABLE not in state and "text.positional_embedding" in state:
        logging.warning(f"{path} has no corner tokens: they start from random numbers; train before you trust them")
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


def _listed(title: str, items: list[str], num_shown: int = 4) -> list[str]:
    more = [f"    .. and {len(items) - num_shown:,} more"] if len(items) > num_shown else []
    return [f"  {title}: {len(items):,}", *(f"    {item}" for item in items[:num_shown]), *more] if items else []


def _likely_reason(missing: list[str], unexpected: list[str], reshaped: list[str], shapes: dict) -> str:
    for key in WORD_TABLES:
        if reshaped == [key] and not missing and not unexpected:
            (theirs, width), (ours, own_width) = shapes[key]
            if width == own_width:
                return f"it has {theirs - ours:+d} corner tokens against the model's number (--num-corner-tokens)"
    if unexpected == [CORNER_TABLE] or (reshaped == [CORNER_TABLE] and not missing):
        return "another number of corner tokens (--num-corner-tokens)"
    if reshaped and set(reshaped) <= set(POSITION_TABLES) and not missing and not unexpected:
        return f"another context length (--context-length {shapes[reshaped[0]][0][0]})"
    return "wrong --model, most likely"


def load_pretrained_text(text: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Loads a pretrained encoder's weights into a text tower; the corners keep their random rows.

    Args:
        text: a `CornerHFText`.
        state: of `hf_encoders.load_pretrained_encoder`.
        name: for messages.

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


def load_pretrained_image(trunk: nn.Module, path: str | Path) -> None:
    """Loads a timm weights file into an image tower's trunk; the classifier in the file is left out.

    Raises:
        ValueError: weights of another architecture.
    """
    own = trunk.state_dict()
    state = {k: v for k, v in read_state_dict(path).items() if k in own or not k.startswith(("head.", "fc_norm."))}
    _load_all(trunk, state, f"pretrained image weights {path}")


def _load_all(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    own = module.state_dict()
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape] + sorted(state.keys() - own.keys())
    if wrong:
        raise ValueError(f"{what}: another architecture; {len(wrong)} keys do not fit, first {', '.join(wrong[:3])}")
    module.load_state_dict(state)
