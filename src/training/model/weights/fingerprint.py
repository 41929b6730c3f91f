"""Fingerprints of models, so that results cached for one model are not used for another."""

import io
import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

# Cover what tokenizers treat differently: case, accents, sentence ends, whitespace, length.
PROBE_TEXTS = ["A dog.", "Naïve café, 3.5 &amp; more. THE END.\nNew  line </s>", "word " * 5000]
_PLAIN = (bool, int, float, str, type(None))
# Settings that change no feature of a module in evaluation mode.
_INERT = ("training", "dropout", "drop_prob", "drop_rate", "checkpoint", "requires_grad", "frozen", "output_attentions")


def fingerprint(module: nn.Module, leave_out: str | None = None) -> str:
    """Returns the SHA-256 of a module's weights, structure and settings (about 1 s per GB).

    Two modules with equal weights have different fingerprints if a class, a function or a plain attribute of a part
    differs: number of heads, activation, pooling, epsilon of a norm.

    Args:
        module: on any device.
        leave_out: parts, parameters and buffers whose names start with this prefix are ignored.
    """
    digest = sha256(json.dumps(dict(_settings(module, leave_out)), sort_keys=True).encode())
    tensors = {**module.state_dict(), **dict(module.named_buffers())}  # also buffers that are not saved
    for name, value in sorted(tensors.items()):
        if leave_out and name.startswith(leave_out):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(module: nn.Module, leave_out: str | None) -> Iterator[tuple[str, object]]:
    """Yields (name of a submodule, its class and settings)."""
    for name, submodule in module.named_modules():
        if (leave_out and f"{name}.".startswith(leave_out)) or "Drop" in type(submodule).__name__:
            continue
        settings = {key: _plain(value) for key, value in vars(submodule).items() if _counts(key)}
        if hasattr(getattr(submodule, "config", None), "to_dict"):  # of transformers
            settings["config"] = {k: _plain(v) for k, v in submodule.config.to_dict().items() if _counts(k)}
        yield name, [type(submodule).__qualname__, {key: value for key, value in settings.items() if value != ""}]


def _counts(key: str) -> bool:
    return not key.startswith("_") and not any(word in key for word in _INERT) and key != "transformers_version"


def _plain(value: object) -> object:
    """Returns a setting as a value for JSON; an empty string for what is none, such as a tensor or a submodule."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return ""


def probe_images() -> list[bytes]:
    """Returns image files that cover what readers treat differently: EXIF rotation, size, transparency, 16 bits."""
    noise = torch.randint(0, 256, (401, 613, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    images: list[tuple[Image.Image, dict[str, Any]]] = [
        (Image.fromarray(noise[:, :, :3]), {"format": "JPEG", "exif": turned}),
        (Image.fromarray(noise[:40, :30]), {"format": "PNG"}),
        (Image.fromarray(noise[:50, :40, 0].astype(np.uint16) * 257), {"format": "PNG"}),
    ]
    files = []
    for image, options in images:
        image.save(file := io.BytesIO(), **options)
        files.append(file.getvalue())
    return files


def rounded(features: torch.Tensor, number: int = 16) -> list[float]:
    """Returns some of the numbers of features [n, dim], coarsely enough that the order of a sum changes none of them.

    Args:
        features: L2-normalised, so that a number is about 1 / sqrt(dim).
        number: how many numbers to return.
    """
    flat = features.double().flatten() * features.shape[1] ** 0.5
    chosen = flat[torch.linspace(0, len(flat) - 1, number).long()]
    return [round(float(value), 1) + 0.0 for value in chosen]  # -0.0 + 0.0 = 0.0
