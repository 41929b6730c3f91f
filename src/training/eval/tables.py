"""Tables of text: how numbers are written, and rows of named cells as a table for a terminal or a README."""

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from training.eval.record import DIRECTIONS


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


def of_expected(number: float, expected: float) -> str:
    """Returns ``1,000`` for a complete benchmark, ``9,412 of 10,000`` for an incomplete one."""
    return f"{number:,.0f}" if number == expected else f"{number:,.0f} of {expected:,.0f}"


def result_rows(records: Iterable[Mapping[str, object]]) -> list[dict[str, str]]:
    """Returns the cells of a table of results, in percent: image to text before text to image.

    Args:
        records: rows of `training.results.load`, or `Result.columns`; all of retrieval, or all of classification.
    """
    return [_retrieval_cells(r) if "i2t-top1" in r else _classification_cells(r) for r in records]


def _retrieval_cells(record: Mapping[str, object]) -> dict[str, str]:
    row = {"benchmark": record["benchmark"], "pairs": of_expected(record["num-pairs"], record["num-expected"])}
    for direction, name in DIRECTIONS.items():
        row[f"{name}\nR@1"] = percent(record[f"{direction}-top1"])
        row[f"{name}\n95%"] = interval(record[f"{direction}-top1-ci95"])
        row |= {f"{name}\nR@{k}": percent(record[f"{direction}-top{k}"]) for k in (5, 10)}
        median, mean = record[f"{direction}-median-rank"], record[f"{direction}-mean-rank"]
        row[f"{name} rank\nmedian / mean"] = f"{median:.6g} / {mean:.1f}"
    cut, lost = record["truncated-share"], record["truncated-mean-tokens-lost"]
    unknown = cut is None or cut != cut  # features from a file without token counts; NaN in a table
    row["captions\ncut"] = "-" if unknown else f"{100 * cut:.1f}%"
    return row | {"tokens\nlost": "-" if unknown else f"{lost:.1f}"}


def _classification_cells(record: Mapping[str, object]) -> dict[str, str]:
    row = {"zero-shot": record["benchmark"], "images": of_expected(record["num-images"], record["num-expected"])}
    row |= {"top-1": percent(record["top1"]), "95%\ninterval": interval(record["top1-ci95"])}
    return row | {"top-5": percent(record["top5"])}


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
