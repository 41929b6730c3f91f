"""Fingerprints of models, so that results cached for one model are not used for another."""

from collections.abc import Callable
from hashlib import sha256

import torch
from PIL import Image
from torch import nn

# Cover what tokenizers treat differently: case, accents, sentence ends, whitespace, length.
PROBE_TEXTS = ["A dog.", "Naïve café, 3.5 &amp; more. THE END.\nNew  line </s>", "word " * 5000]


def fingerprint(module: nn.Module, leave_out: str | None = None) -> str:
    """Returns the SHA-256 of a module's parameters and buffers: names, shapes, types and bytes (about 1 s per GB).

    Args:
        module: on any device.
        leave_out: parameters and buffers whose names start with this prefix are ignored.
    """
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        if leave_out and name.startswith(leave_out):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def preprocessing_fingerprint(preprocess: Callable) -> str:
    """Returns the SHA-256 of a deterministic transform's output for a fixed image."""
    noise = torch.randint(0, 256, (401, 613, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return sha256(preprocess(Image.fromarray(noise.numpy())).contiguous().numpy()).hexdigest()


def tokenizer_fingerprint(tokenizer: Callable) -> str:
    """Returns the SHA-256 of a tokenizer's ids for a few fixed texts."""
    ids = tokenizer(list(PROBE_TEXTS))
    return sha256(f"{tuple(ids.shape)} {ids.tolist()}".encode()).hexdigest()
