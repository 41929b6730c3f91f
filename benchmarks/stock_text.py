"""The text side of a stock model, forward and backward: short captions in buckets against captions padded to 77."""

import torch
from torch.nn import functional

import training
from benchmarks.measure import CLS, SEP, Figure, Setting, check_close, fastest, gradient, reference_captions
from training.model.assembly.from_flags import make_arranger
from training.model.towers.encoders import text_encoder

START, END, CONTEXT_LENGTH = 49406, 49407, 77


def run(setting: Setting) -> list[Figure]:
    """Measures CLIP's text tower as open_clip's trainer runs it, and as ours does."""
    name, num_captions = setting.pick(("ViT-S-32-alt", 4), ("ViT-B-32", 64), ("ViT-B-32", 1024))
    torch.manual_seed(0)
    model = training.create_model(name, device=setting.device)
    ids = short_captions(num_captions)
    arrange = make_arranger(model, "auto", setting.device)
    encoder = text_encoder(model)
    on_device = ids.to(setting.device)
    weights: list[torch.Tensor] = []

    def backward(features: torch.Tensor) -> torch.Tensor:
        features = functional.normalize(features, dim=-1)
        if not weights:
            weights.append(torch.randn_like(features))
        (features * weights[0]).sum().backward()
        return features.detach()

    def baseline() -> torch.Tensor:
        return backward(model.encode_text(on_device))

    def ours() -> torch.Tensor:
        return backward(encoder.packed_features(arrange(ids).to(setting.device))[:, 0])

    expected, expected_gradient = baseline(), gradient(model)
    check_close("stock_text, features", ours(), expected, 1e-5)
    check_close("stock_text, gradients", gradient(model), expected_gradient, 1e-5)
    seconds = fastest({"baseline": baseline, "ours": ours}, setting)
    tokens = int((ids != 0).sum())
    return [
        Figure(
            "stock_text",
            f"text side of {name}, forward and backward: {num_captions} captions of {tokens / num_captions:.0f} tokens",
            {"time_ratio": seconds["baseline"] / seconds["ours"], "token_ratio": ids.numel() / arrange(ids).num_padded},
            {"seconds": seconds, "padding_share": 1 - tokens / ids.numel()},
        )
    ]


def short_captions(count: int) -> torch.Tensor:
    """Returns the raw captions of `reference_captions` with CLIP's start and end tokens, ids [count, 77]."""
    ids = reference_captions(count, 0, num_corners=0)[0][:, :CONTEXT_LENGTH]
    return ids.masked_fill(ids == CLS, START).masked_fill(ids == SEP, END)
