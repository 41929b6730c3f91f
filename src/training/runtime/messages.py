"""Messages: underlying errors in one line, names that are not UTF-8, and failures that cost only a warning."""

import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def first_line(error: Exception) -> str:
    """Returns the first line of an error, at most 200 characters; its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def printable(text: str | Path) -> str:
    """Returns a text or a file name in which what is not UTF-8 is written as escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def print_any_name() -> None:
    """Lets `print` write names that are not UTF-8 as escapes, as Python's standard error does."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@cache
def warn_once(message: str) -> None:
    """Logs a warning, the same one once per process."""
    logging.warning(message)


def or_warn(write: Callable[[], T], what: str) -> T | None:
    """Runs a function that writes files; an error, such as a full disk, costs a warning and returns None."""
    try:
        return write()
    except (OSError, ValueError) as error:
        logging.warning(f"{what} could not be written: {first_line(error)}")
        return None
