"""Functions that parse the value of a flag; if the text is wrong, the message says what was expected."""

import argparse
from decimal import Decimal, InvalidOperation


def whole_number(text: str, minimum: int) -> int:
    """Parses a whole number, which may be written as ``4e8``."""
    try:
        number = Decimal(text)
        whole = number.is_finite() and number == int(number)
    except InvalidOperation:
        whole = False
    if not whole or number < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
    return int(number)


def positive_numbers(text: str) -> tuple[int, ...]:
    """Parses a list of positive numbers without duplicates: ``1000,10000`` -> (1000, 10000)."""
    return tuple(dict.fromkeys(whole_number(part, 1) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parses a list of names: ``a,b`` -> (a, b); an empty text gives an empty tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
