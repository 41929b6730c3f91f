"""How the words after a flag are read. Each function says what it expected if the text is wrong."""

import argparse
from decimal import Decimal, InvalidOperation


def whole_number(text: str, minimum: int) -> int:
    """Reads a whole number, also in the form ``4e8``."""
    try:
        number = Decimal(text)
        whole = number.is_finite() and number == int(number)
    except InvalidOperation:
        whole = False
    if not whole or number < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
    return int(number)


def positive_numbers(text: str) -> tuple[int, ...]:
    """``1000,10000`` -> (1000, 10000)."""
    return tuple(dict.fromkeys(whole_number(part, 1) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """``a,b`` -> (a, b); empty text gives none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
