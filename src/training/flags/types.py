"""Types of flag values. Each function parses a text; its error says what was expected."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from dataloaders.values import names, positive_numbers, whole_number

__all__ = ["Switch", "json_object", "names", "not_negative", "positive", "positive_numbers"]


class Switch(argparse.Action):
    """A flag without a value: ``--name`` turns it on; ``--no-name`` turns it off, overriding a --config file."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = False, help: str | None = None):
        self.negatives = ["--no-" + name[2:] for name in option_strings]
        super().__init__([*option_strings, *self.negatives], dest, nargs=0, default=default, help=help)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, option_string not in self.negatives)


def positive(text: str) -> int:
    """Parses a whole number of at least 1; ``4e8`` gives 400000000."""
    return whole_number(text, 1)


def not_negative(text: str) -> int:
    """Parses a whole number of at least 0."""
    return whole_number(text, 0)


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object like '{{\"max_model_len\": 4096}}', found {text!r}")
    return value
