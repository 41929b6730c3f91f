"""Converts weights of CLIP and SigLIP between transformers' and open_clip's names. The tables serve both directions."""

import torch

_QKV = ("q", "k", "v")
# Beginnings of names: transformers', open_clip's with CLIP's towers, open_clip's with SigLIP's.
_THEIRS, _CLIP, _SIGLIP = range(3)
_NAMES = (
    ("text_model.embeddings.token_embedding.", "token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks.", "transformer.resblocks."),
    ("text_projection.weight", "text_projection", None),
    ("text_model.head.", None, "text_projection."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding", None),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1.", "visual.trunk.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", "visual.trunk.pos_embed"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre.", None),
    ("vision_model.post_layernorm.", "visual.ln_post.", "visual.trunk.norm."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks.", "visual.trunk.blocks."),
    ("visual_projection.weight", "visual.proj", None),
    ("vision_model.head.probe", None, "visual.trunk.attn_pool.latent"),
    ("vision_model.head.attention.in_proj_", None, "visual.trunk.attn_pool.in_proj_"),
    ("vision_model.head.attention.out_proj.", None, "visual.trunk.attn_pool.proj."),
    ("vision_model.head.layernorm.", None, "visual.trunk.attn_pool.norm."),
    ("vision_model.head.mlp.", None, "visual.trunk.attn_pool.mlp."),
)
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip stores these linear maps as [in, out]
_LAYER = (  # transformers, open_clip, timm
    (".self_attn.out_proj.", ".attn.out_proj.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.in_proj_", ".attn.qkv."),
    (".layer_norm1.", ".ln_1.", ".norm1."),
    (".layer_norm2.", ".ln_2.", ".norm2."),
    (".mlp.fc1.", ".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.fc2.", ".mlp.c_proj.", ".mlp.fc2."),
)


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
    for names in _NAMES:
        old, new = names[source], names[target]
        if old and new and key.startswith(old):
            rest = key.removeprefix(old)
            last = 2 if "trunk" in old + new else 1  # column of open_clip's names within a layer
            for words in _LAYER if old.endswith((".layers.", ".resblocks.")) else ():
                rest = rest.replace(words[min(source, last)], words[min(target, last)])
            return new + rest
    return key
