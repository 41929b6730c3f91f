"""Converts weights of CLIP and SigLIP between the names of transformers and of open_clip, in both directions."""

from pathlib import Path

import torch
import yaml

_QKV = ("q", "k", "v")
_THEIRS, _CLIP, _SIGLIP = range(3)  # columns of the table of names
_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip stores these linear maps as [in, out]


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts transformers' weights to open_clip's names; unknown names stay.

    Args:
        state: weights of `CLIPModel` or `SiglipModel`; not changed.
    """
    siglip = "vision_model.head.probe" in state
    state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        projections = [state.pop(key.replace("q_proj", f"{kind}_proj")) for kind in _QKV]
        state[key.replace("q_proj", "qkv")] = torch.cat(projections)
    result = {}
    for key, value in state.items():
        name = _renamed(key, _THEIRS, _SIGLIP if siglip else _CLIP)
        result[name] = value.T.contiguous() if name in _TRANSPOSED else value
    if siglip:  # timm's attention pooling has one map for queries, and one for keys and values
        result["visual.trunk.pos_embed"] = result["visual.trunk.pos_embed"][None]
        for kind in ("weight", "bias"):
            queries, *others = result.pop(f"visual.trunk.attn_pool.in_proj_{kind}").chunk(3)
            result[f"visual.trunk.attn_pool.q.{kind}"] = queries
            result[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat(others)
    return result


def from_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts the weights of an open_clip model with CLIP's own towers to the names of transformers' `CLIPModel`.

    Args:
        state: weights with text keys at the top level or below ``text.``; not changed.
    """
    result = {}
    for key, value in state.items():
        key = key.removeprefix("text.")
        name = _renamed(key, _CLIP, _THEIRS)
        value = value.T.contiguous() if key in _TRANSPOSED else value
        if ".self_attn.qkv." in name:
            for kind, rows in zip(_QKV, value.chunk(3)):
                result[name.replace("qkv", f"{kind}_proj")] = rows.contiguous()
        else:
            result[name] = value
    return result


def _renamed(key: str, source: int, target: int) -> str:
    for names in _TABLES["names"]:
        old, new = names[source], names[target]
        if old and new and key.startswith(old):
            rest = key.removeprefix(old)
            last = 2 if "trunk" in old + new else 1  # column of open_clip's names within a layer
            for words in _TABLES["layers"] if old.endswith((".layers.", ".resblocks.")) else ():
                rest = rest.replace(words[min(source, last)], words[min(target, last)])
            return new + rest
    return key
