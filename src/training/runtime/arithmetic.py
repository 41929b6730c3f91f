"""The precision of fp32 products, algorithms that always give the same result, and the state of random generators."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Context in which CUDA multiplies fp32 matrices in TF32, with 10 bits of mantissa; no effect on other devices."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Context in which PyTorch uses only deterministic algorithms; to be entered before the first product on a GPU.

    Raises:
        ValueError: the environment asks cuBLAS for a workspace with which its results vary.
    """
    if not is_wanted:
        yield
        return
    if os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise ValueError(f"--deterministic: {WORKSPACE}={os.environ[WORKSPACE]}; unset it, or set {WORKSPACES[0]}")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def get_random_state() -> dict[str, torch.Tensor | None]:
    """Returns the state of torch's random generators of this process, on the CPU and on its GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores a state returned by `get_random_state`, which may have been saved in a file."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
