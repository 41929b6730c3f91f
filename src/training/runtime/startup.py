"""What makes a process start sooner."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_imports() -> Iterator[None]:
    """Keeps the garbage collector away while a fresh process imports PyTorch and what stands on it.

    Imports create about a million objects, nearly all of which stay, and the collector would look through them again
    and again. Later collections leave these objects out, too, so that loader processes keep sharing their memory. In a
    process that has imported PyTorch before, this does nothing.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
