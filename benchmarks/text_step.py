"""The text tower's share of a step, forward and backward: packed captions against padded ones."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

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
    largest_that_fits,
    matrix_rate,
    peak_bytes,
    reference_captions,
)
from training.model.assembly.from_flags import make_arranger
from training.model.towers.encoders import text_encoder
from training.model.towers.hf_tower import CornerHFText

NUM_CORNERS = 2


def make_tower(setting: Setting) -> CornerHFText:
    """A BERT: base on a GPU, of MiniLM's size on the CPU, two thin layers for a quick run. No dropout: both sides
    must give the same."""
    layers, width = setting.pick((2, 128), (6, 384), (12, 768))
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


def run(setting: Setting) -> Iterator[Figure]:
    """1 raw + 1 long caption (text_step), 1 raw + 3 long ones (text_step_3_long); on a CPU also 1 + 1 in bf16."""
    tower, size = make_tower(setting), setting.pick(8, 32, 1024)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    rate = matrix_rate(setting, dtype)
    for name, num_long in (("text_step", 1), ("text_step_3_long", 3)):
        yield largest_that_fits(partial(_figure, name, num_long, tower, dtype, rate, setting), size)
    if not setting.on_gpu:
        rate = matrix_rate(setting, torch.bfloat16)
        yield _figure("text_step_bf16", 1, tower, torch.bfloat16, rate, setting, setting.pick(2, 32, 1024))


def _figure(
    name: str, num_long: int, tower: CornerHFText, dtype: torch.dtype, rate: float, setting: Setting, num_images: int
) -> Figure:
    short, long = reference_captions(num_images, num_long, NUM_CORNERS)
    together = torch.cat([short[:, None], long], dim=1).to(setting.device)
    arrange = make_arranger(tower, "auto", setting.device)
    captions = arrange(short, long)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(setting.device.type, dtype)
    weights = torch.randn(num_images, 1 + num_long * (NUM_CORNERS + 1), tower.output_dim, device=setting.device)

    def backward(features: torch.Tensor) -> torch.Tensor:
        tower.zero_grad()
        (features.float() * weights).sum().backward()
        return features.detach().float()

    def baseline() -> torch.Tensor:
        with autocast:
            return backward(published.text_features(tower, together))

    def ours() -> torch.Tensor:
        with autocast:  # arranging is counted here, although it runs in the loader during training
            return backward(packed(tower, arrange(short, long).to(setting.device), num_images))

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    expected, expected_gradient = baseline(), gradient(tower)
    check_close(f"{name}, features", ours(), expected, tolerance)
    check_close(f"{name}, gradients", gradient(tower), expected_gradient, tolerance)
    lengths = torch.cat([(short != 0).sum(-1), (long != 0).sum(-1).flatten()])
    products = _products(tower, int(lengths.sum()), dtype, setting.device)
    products()
    seconds = fastest({"baseline": baseline, "ours": ours, "products": products}, setting)
    memory = {side: peak_bytes(work, setting) for side, work in {"baseline": baseline, "ours": ours}.items()}
    tower.zero_grad()
    title = (
        f"text tower, forward and backward: {num_images:,} x (1 raw + {num_long} long), "
        f"{tower.transformer.config.num_hidden_layers} layers x {tower.output_dim}, {dtype}"
    )
    ratios = {
        "token_ratio": together.numel() / captions.num_padded,
        "time_ratio": seconds["baseline"] / seconds["ours"],
        "memory_ratio": memory["baseline"] / memory["ours"],
    }
    tokens = {"baseline": together.numel(), "ours": captions.num_padded, "without_padding": int(lengths.sum())}
    facts = {
        "tokens_per_image": {side: count / num_images for side, count in tokens.items()},
        "padding_share": 1 - int(lengths.sum()) / captions.num_padded,
        "seconds": seconds,
        "peak_bytes": memory,
    }
    return Figure(name, title, ratios, facts | _utilisation(tower, lengths, seconds, rate))


def _utilisation(
    tower: CornerHFText, lengths: torch.Tensor, seconds: dict[str, float], rate: float
) -> dict[str, float]:
    """FLOP/s of our side on real tokens, and how much of the distance to `rate` the linear layers' products explain."""
    flops = _flops(tower, lengths)
    return {
        "matrix_tflop_per_s": rate / 1e12,
        "tflop_per_s": flops / seconds["ours"] / 1e12,
        "flop_utilisation": flops / seconds["ours"] / rate,
        "products_utilisation": _linear_flops(tower, int(lengths.sum())) / seconds["products"] / rate,
        "products_share": seconds["products"] / seconds["ours"],
    }


def _products(tower: CornerHFText, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Returns what computes only the matrix products of the linear layers on all tokens, forward and backward."""
    matrices = [weight.detach().to(dtype) for weight in _matrices(tower)]
    rows = {width: torch.randn(num_tokens, width, dtype=dtype, device=device) for m in matrices for width in m.shape}

    def work() -> None:
        for matrix in matrices:
            inputs, gradients = rows[matrix.shape[1]], rows[matrix.shape[0]]
            inputs @ matrix.T
            gradients @ matrix
            gradients.T @ inputs

    return work


def _matrices(tower: CornerHFText) -> list[torch.Tensor]:
    """Returns the weights of the linear layers that are applied to all tokens; the last layer has keys and values."""
    *whole, last = tower.layers()
    keys_and_values = last.attention.self.key.weight, last.attention.self.value.weight
    return [p for layer in whole for p in layer.parameters() if p.ndim == 2] + [*keys_and_values]


def _linear_flops(tower: CornerHFText, num_tokens: int) -> float:
    """Returns the FLOPs of `_products`: 6 per weight and token."""
    return 6 * num_tokens * sum(weight.numel() for weight in _matrices(tower))


def _flops(tower: CornerHFText, lengths: torch.Tensor) -> float:
    """Returns the FLOPs of forward and backward over real tokens.

    There are 6 per weight and token in linear layers, and 12 per layer, width and pair of tokens in attention. Of the
    last layer, only what [CLS] and the corners need is counted.
    """
    width, layers = tower.transformer.config.hidden_size, tower.layers()
    tokens, pairs = int(lengths.sum()), float(lengths.double().square().sum())
    num_read = tower.num_corners + 1
    rest_of_last = sum(p.numel() for p in layers[-1].parameters() if p.ndim == 2) - 2 * width * width
    attention = 12 * width * ((len(layers) - 1) * pairs + num_read * tokens)
    return _linear_flops(tower, tokens) + 6 * rest_of_last * num_read * len(lengths) + attention
