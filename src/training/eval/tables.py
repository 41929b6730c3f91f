"""Tables of text: how numbers are written, and rows of named cells as a table for a terminal or a README."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate


def percent(value: float) -> str:
    """Returns a fraction in percent, such as ``41.20``."""
    return f"{100 * value:.2f}"


def points(value: float) -> str:
    """Returns a difference of fractions in percentage points, such as ``-1.50``."""
    return f"{100 * value:+.2f}"


def interval(bounds: Sequence[float], signed: bool = False) -> str:
    """Returns an interval of fractions in percent: ``40.1-42.3``, or ``-2.0 to +0.3`` for differences."""
    low, high = (100 * bound for bound in bounds)
    return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f}-{high:.1f}"


def format_rows(rows: Sequence[Mapping[str, str]], num_left: int = 1, **options: object) -> str:
    """Returns a table with the names of the cells as headings.

    Args:
        rows: name -> text; all rows have the names of the first, and a missing cell is empty.
        num_left: number of left-aligned columns, from the left; the others are right-aligned.
        options: further arguments of `tabulate.tabulate`.
    """
    names = list(rows[0])
    cells = [[row.get(name, "") for name in names] for row in rows]
    align = ["left"] * num_left + ["right"] * (len(names) - num_left)
    return tabulate(cells, headers=names, colalign=align, disable_numparse=True, **options)
