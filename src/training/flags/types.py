"""What a flag's words are read as. For argparse: each takes a text, and says what it expected if that is not it."""

import argparse
import json
from typing import Any


def _integer(text: str, minimum: int) -> int:
    if not text.strip().lstrip("-").isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
    return int(text)


def positive(text: str) -> int:
    """``12`` -> 12."""
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
