"""Makes processes start faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_imports() -> Iterator[None]:
    """Disables the garbage collector while a new process imports PyTorch and packages that depend on it.

    Imports create about a million objects, nearly all of them permanent, which the collector would traverse repeatedly.
    Later collections ignore these objects, too, so that loader processes keep sharing their memory. If the process has
    already imported PyTorch, this does nothing.
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
