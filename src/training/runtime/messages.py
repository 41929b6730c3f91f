"""Messages and pages: errors in one line, names that are not UTF-8, failures that cost only a warning, HTML."""

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


def render_page(template: Path, **values: object) -> str:
    """Renders a template, in which every value is escaped unless it is Markdown; it can include others in its folder.

    Names in the values need not be UTF-8.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not in `values`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    escape = not template.name.endswith(".md.j2")
    environment = Environment(autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = FileSystemLoader(template.parent)
    return printable(environment.get_template(template.name).render(values))
