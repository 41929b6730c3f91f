"""The text tower's share of a step, forward and backward: packed captions against padded ones."""

from contextlib import nullcontext

import torch
from transformers import BertConfig

from benchmarks import published
from benchmarks.measure import (
    CONTEXT_LENGTH,
    Figure,
    Setting,
    check_close,
    fastest,
    gradient,
    matrix_rate,
    peak_bytes,
    reference_captions,
)
from training.model.from_flags import make_arranger
from training.model.text_encoder import text_encoder
from training.model.text_tower import CornerHFText

NUM_CORNERS = 2


def make_tower(setting: Setting) -> CornerHFText:
    """A BERT: base on a GPU, of MiniLM's size on the CPU, two thin layers for a quick run. No dropout: both sides
    must give the same."""
    layers, width = setting.pick((2, 256), (6, 384), (12, 768))
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return CornerHFText(config, width, NUM_CORNERS, CONTEXT_LENGTH).to(setting.device).train()


def packed(tower: CornerHFText, captions: object, num_images: int) -> torch.Tensor:
    """[batch, T, dim] of arranged captions, as `TrainModel` puts them together."""
    features = text_encoder(tower).packed_features(captions)
    short, long = features[:num_images], features[num_images:].unflatten(0, (num_images, -1))
    return torch.cat([short[:, :1], long.flatten(1, 2)], dim=1)


def run(setting: Setting) -> list[Figure]:
    """1 raw + 1 long caption (text_step), and 1 raw + 3 long ones (text_step_3_long)."""
    tower = make_tower(setting)
    rate = matrix_rate(setting)
    return [_figure("text_step", 1, tower, rate, setting), _figure("text_step_3_long", 3, tower, rate, setting)]


def _figure(name: str, num_long: int, tower: CornerHFText, rate: float, setting: Setting) -> Figure:
    num_images = setting.pick(16, 32, 1024)
    short, long = reference_captions(num_images, num_long, NUM_CORNERS)
    together = torch.cat([short[:, None], long], dim=1).to(setting.device)
    arrange = make_arranger(tower, "auto", setting.device, compiled=False)
    captions = arrange(short, long)
    autocast = torch.autocast("cuda", torch.bfloat16) if setting.on_gpu else nullcontext()
    weights = torch.randn(num_images, 1 + num_long * (NUM_CORNERS + 1), tower.output_dim, device=setting.device)

    def backward(features: torch.Tensor) -> torch.Tensor:
        (features.float() * weights).sum().backward()
        return features.detach().float()

    def baseline() -> torch.Tensor:
        with autocast:
            return backward(published.text_features(tower, together))

    def ours() -> torch.Tensor:
        with autocast:  # arranging, in training the loader's work, is counted here
            return backward(packed(tower, arrange(short, long).to(setting.device), num_images))

    tolerance = 2e-2 if setting.on_gpu else 1e-4
    expected, expected_gradient = baseline(), gradient(tower)
    check_close(f"{name}, features", ours(), expected, tolerance)
    check_close(f"{name}, gradients", gradient(tower), expected_gradient, tolerance)
    seconds = fastest({"baseline": baseline, "ours": ours}, setting)
    num_tokens = int((short != 0).sum() + (long != 0).sum())
    flops = _flops(tower, torch.cat([(short != 0).sum(-1), (long != 0).sum(-1).flatten()]))
    memory = {side: peak_bytes(work, setting) for side, work in {"baseline": baseline, "ours": ours}.items()}
    tower.zero_grad()
    return Figure(
        name,
        f"text tower, forward and backward: {num_images} x (1 raw + {num_long} long), "
        f"{tower.transformer.config.num_hidden_layers} layers x {tower.output_dim}, {arrange.mode}",
        {
            "token_ratio": together.numel() / captions.num_slots,
            "time_ratio": seconds["baseline"] / seconds["ours"],
            "memory_ratio": memory["baseline"] / memory["ours"],
        },
        {
            "tokens_per_image": {
                "baseline": together.numel() / num_images,
                "ours": captions.num_slots / num_images,
                "without_padding": num_tokens / num_images,
            },
            "padding_share": 1 - num_tokens / captions.num_slots,
            "seconds": seconds,
            "peak_bytes": memory,
            "tflop_per_s": flops / seconds["ours"] / 1e12,
            "flop_utilisation": flops / seconds["ours"] / rate,
        },
    )


def _flops(tower: CornerHFText, lengths: torch.Tensor) -> float:
    """Of forward and backward over real tokens: 6 per weight and token in linear layers, 12 per layer, width and pair
    of tokens in attention; of the last layer only what [CLS] and the corners need."""
    width, layers = tower.transformer.config.hidden_size, tower.family.layers(tower.transformer)
    tokens, pairs = float(lengths.sum()), float(lengths.double().square().sum())
    read = (tower.num_corners + 1) * len(lengths)
    weights = sum(p.numel() for p in layers[-1].parameters() if p.ndim == 2)
    whole_layers = 6 * weights * tokens + 12 * width * pairs
    keys_and_values = 2 * width * width
    last_layer = 6 * (keys_and_values * tokens + (weights - keys_and_values) * read)
    return (len(layers) - 1) * whole_layers + last_layer + 12 * width * (tower.num_corners + 1) * tokens
