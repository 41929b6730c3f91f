"""Typed results of an evaluation, their conversion to JSON, and their tables.

The JSON keys are the published ones, such as ``dci-retrieval-i2t-top1`` and ``imagenet-zeroshot-val-top1``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tabulate import tabulate

DIRECTIONS = {"i2t": "I2T", "t2i": "T2I"}
TEMPLATES = "open_clip's class names and templates"


@dataclass(frozen=True)
class Recall:
    """Recall and ranks over the queries of one direction.

    Attributes:
        top1, top5, top10: fraction of queries with a right answer among the first k.
        top1_ci95: 95% bootstrap interval of `top1`, [low, high].
        mean_rank, median_rank: mean and median rank of the first right answer; ranks start at 1.
    """

    top1: float
    top5: float
    top10: float
    top1_ci95: tuple[float, float]
    mean_rank: float
    median_rank: float

    @classmethod
    def of(cls, summary: dict) -> "Recall":
        """Creates a `Recall` from the result of `metrics.summarise`."""
        return cls(**{name.replace("-", "_"): value for name, value in summary.items()})


@dataclass(frozen=True)
class Result:
    """Base of the results of all kinds of benchmarks.

    Attributes:
        title: name of the benchmark in tables.
        key: prefix of the benchmark's JSON keys.
        num_pairs: number of pairs (retrieval) or images (classification) evaluated.
        num_expected: number of pairs or images in the complete benchmark.
        num_missing, num_broken: numbers left out because the image file is missing or unreadable.
        unit: what is counted, ``pairs`` or ``images``.
    """

    title: str
    key: str
    num_pairs: int
    num_expected: int
    num_missing: int
    num_broken: int
    unit: ClassVar[str] = "pairs"

    @property
    def is_complete(self) -> bool:
        """Whether the complete benchmark was evaluated."""
        return self.num_pairs == self.num_expected

    def columns(self) -> dict[str, Any]:
        """Returns the values under their published names without the key, as in the columns of `training.results`."""
        found: dict[str, Any] = {"benchmark": self.title}
        for name, value in vars(self).items():
            found |= {f"{name}-{k}": v for k, v in vars(value).items()} if isinstance(value, Recall) else {name: value}
        del found["key"]
        found[f"num_{self.unit}"] = found.pop("num_pairs")
        found[self.unit] = f"{self.num_pairs:,} of {self.num_expected:,} {self.unit}"
        return {name.replace("_", "-"): value for name, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns the values under their published keys."""
        return {f"{self.key}-{name}": value for name, value in self.columns().items() if name != "benchmark"}


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Result of one retrieval benchmark.

    Attributes:
        protocol: name of the benchmark's variant; empty for a user's own pairs.
        fingerprint: hash of the exact list of image names and captions.
        num_images: number of distinct images.
        i2t, t2i: recall with images and with captions as queries.
        truncated_share: fraction of captions that the tokenizer truncated; None if unknown.
        truncated_mean_tokens_lost: mean number of tokens lost by truncated captions; None if unknown.
    """

    protocol: str
    fingerprint: str
    num_images: int
    i2t: Recall
    t2i: Recall
    truncated_share: float | None
    truncated_mean_tokens_lost: float | None


@dataclass(frozen=True)
class ClassificationResult(Result):
    """Result of zero-shot classification of one set of images.

    Attributes:
        top1, top5: fraction of images whose class is among the first k.
        top1_ci95: 95% bootstrap interval of `top1`, [low, high].
        prompts: which texts describe the classes.
    """

    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    prompts: str = TEMPLATES
    unit: ClassVar[str] = "images"


def describe_pairs(title: str, protocol: str, fingerprint: str) -> str:
    """Returns a line such as ``DCI: dci/short+extra, pairs 0f3a...``."""
    return f"{title}: {protocol or 'your own pairs'}, pairs {fingerprint}"


def to_json(results: Sequence[Result]) -> dict[str, object]:
    """Returns all benchmarks' values as one flat dict, the form used in results.jsonl and in a training's log."""
    return {name: value for result in results for name, value in result.to_json().items()}


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


def result_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the cells of a table of results, in percent: image to text before text to image.

    Args:
        records: rows of `training.results.load`, or `Result.columns`; all of retrieval, or all of classification.
    """
    rows = []
    for r in records:
        if "i2t-top1" not in r:
            row = {"zero-shot": r["benchmark"], "images": of_expected(r["num-images"], r["num-expected"])}
            row |= {"top-1": percent(r["top1"]), "95%\ninterval": interval(r["top1-ci95"]), "top-5": percent(r["top5"])}
            rows.append(row)
            continue
        row = {"benchmark": r["benchmark"], "pairs": of_expected(r["num-pairs"], r["num-expected"])}
        for direction, name in DIRECTIONS.items():
            row |= {
                f"{name}\nR@1": percent(r[f"{direction}-top1"]),
                f"{name}\n95%": interval(r[f"{direction}-top1-ci95"]),
            }
            row |= {f"{name}\nR@{k}": percent(r[f"{direction}-top{k}"]) for k in (5, 10)}
            median, mean = r[f"{direction}-median-rank"], r[f"{direction}-mean-rank"]
            row[f"{name} rank\nmedian / mean"] = f"{median:.6g} / {mean:.1f}"
        cut, lost = r["truncated-share"], r["truncated-mean-tokens-lost"]
        unknown = cut is None or cut != cut  # features from a file without token counts; NaN in a table
        row |= {
            "captions\ncut": "-" if unknown else f"{100 * cut:.1f}%",
            "tokens\nlost": "-" if unknown else f"{lost:.1f}",
        }
        rows.append(row)
    return rows


def format_rows(rows: Sequence[Mapping[str, object]], num_left: int = 1, **options: Any) -> str:
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
