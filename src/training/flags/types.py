"""How the words after a flag are read. Each function takes the text, and says what it expected if the text is wrong."""

import argparse
import json
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any


class Switch(argparse.Action):
    """A flag without a value: ``--name`` turns it on, ``--no-name`` off, as when a --config file has turned it on."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = False, help: str | None = None):
        self.negatives = ["--no-" + name[2:] for name in option_strings]
        super().__init__([*option_strings, *self.negatives], dest, nargs=0, default=default, help=help)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, option_string not in self.negatives)


def _integer(text: str, minimum: int) -> int:
    try:
        number = Decimal(text)
        whole = number.is_finite() and number == int(number)
    except InvalidOperation:
        whole = False
    if not whole or number < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
    return int(number)


def positive(text: str) -> int:
    """``12`` -> 12; ``4e8`` -> 400000000."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """``0`` -> 0."""
    return _integer(text, 0)


def positive_numbers(text: str) -> tuple[int, ...]:
    """``1000,10000`` -> (1000, 10000)."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """``a,b`` -> (a, b); empty text gives none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def json_object(text: str) -> dict[str, Any]:
    """``{"a": 1}`` -> {"a": 1}."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object like '{{\"max_model_len\": 4096}}', found {text!r}")
    return value
