"""Prepares a process before it imports PyTorch."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_imports() -> Iterator[None]:
    """Context in which a new process imports PyTorch and packages that depend on it; nothing if it has done so.

    OpenMP's threads sleep while they wait for each other, unless ``OMP_WAIT_POLICY`` is set. By default they spin, and
    so take the processor from those that they wait for as soon as other work runs beside them: on two cores with a load
    of 8, ViT-B/32 encoded 1.0 images/s, and 1.7 with sleeping threads.

    The garbage collector is disabled: imports create about a million objects, nearly all of them permanent, which it
    would traverse repeatedly. Later collections ignore them, too, so loader processes keep sharing their memory.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
