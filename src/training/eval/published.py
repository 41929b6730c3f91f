"""Compares measured numbers with published ones, which are read from `published.json` or a file of the same format.

{"models": {"NAME": {"size", "year", "data", "match": [["MODEL", "TAG"]], "weights_sha256": ["64 hex digits"]}},
 "numbers": [{"model": "NAME", "protocol", "pairs", "i2t", "t2i", "source", "note"}]}

Numbers are R@1 in percent. ``pairs`` is given if a protocol has several sizes; ``match``, ``weights_sha256`` and
``note`` are optional.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.pairs import MODIFIED
from training.eval.record import DIRECTIONS, RetrievalResult, percent, points
from training.readers.files import read_json

FILE = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class PublishedNumber:
    """One published pair of numbers, R@1 in percent.

    Attributes:
        model: name of the model in the file.
        protocol: name of the protocol, as in results.
        i2t, t2i: R@1 of image to text and of text to image.
        source: where the numbers are published.
        pairs: number of pairs, if the protocol has several sizes.
        note: how the source's evaluation differs from ours.
    """

    model: str
    protocol: str
    i2t: float
    t2i: float
    source: str
    pairs: int | None = None
    note: str = ""


def read_published(path: str | Path = FILE) -> tuple[dict[str, dict], list[PublishedNumber]]:
    """Reads a file of published numbers; returns models by name, and the numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format; the message names the entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--published {path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict) or not {"models", "numbers"} <= content.keys():
        raise ValueError(f"--published {path}: expected an object with models and numbers")
    numbers = []
    for number, row in enumerate(content["numbers"]):
        try:
            numbers.append(PublishedNumber(**row))
        except TypeError as error:
            raise ValueError(f"--published {path}: entry {number} of numbers: {error}") from error
        if numbers[-1].model not in content["models"]:
            raise ValueError(f"--published {path}: entry {number} of numbers: its model is not listed in models")
    return content["models"], numbers


def find_published(
    asked: str | None, model: str, pretrained: str | None, weights_sha256: str | None
) -> list[PublishedNumber]:
    """Returns the published numbers of a run's model; an empty list if there are none.

    Args:
        asked: value of ``--published``: a model's name in our list, or a file that must contain the model; None
            searches our list.
        model, pretrained: the run's ``--model`` and ``--pretrained``.
        weights_sha256: hash of the weights file; a match takes precedence over `model` and `pretrained`.

    Raises:
        FileNotFoundError, ValueError: the name or file given does not exist or does not contain the model.
    """
    file = asked if asked and asked.endswith(".json") else None
    models, numbers = read_published(file or FILE)
    if asked and not file:
        if asked not in models:
            raise ValueError(f"--published {asked}: no such model in our list; expected one of {', '.join(models)}")
        return [number for number in numbers if number.model == asked]
    hashed = [name for name, m in models.items() if weights_sha256 and weights_sha256 in m.get("weights_sha256", ())]
    named = [name for name, m in models.items() if [model, pretrained] in m.get("match", ())]
    found = (hashed + named)[:1]
    if file and not found:
        raise ValueError(
            f"--published {asked}: no model in this file has the weights {weights_sha256} or matches "
            f"{json.dumps([model, pretrained])}; add weights_sha256 or match to one of {', '.join(models)}"
        )
    return [number for number in numbers if number.model in found]


def compare_with_published(
    results: Sequence[RetrievalResult], numbers: Sequence[PublishedNumber]
) -> list[dict[str, object]]:
    """Compares each measured number with every published one of the same protocol and size.

    A set whose list is not the official one has another protocol (`pairs.MODIFIED`); an incomplete set is left out.

    Returns:
        One record per benchmark, published number and direction: ``benchmark``, ``protocol``, ``direction``, ``model``,
        ``source``, ``note``; as fractions, ``measured`` R@1 with its 95% interval ``low`` and ``high``, the ``printed``
        number, and ``difference``, measured minus printed; and ``half_intervals``, the difference divided by half the
        width of the interval, None if the width is 0.
    """
    found = []
    for result, number in itertools.product(results, numbers):
        is_official = result.is_complete and not result.protocol.endswith(MODIFIED)
        same = number.protocol == result.protocol and number.pairs in (None, result.num_expected)
        for direction in DIRECTIONS if is_official and same else ():
            recall, printed = getattr(result, direction), getattr(number, direction) / 100
            (low, high), difference = recall.top1_ci95, recall.top1 - printed
            record = {"benchmark": result.title, "protocol": number.protocol, "direction": direction}
            record |= {"model": number.model, "source": number.source, "note": number.note}
            record |= {"measured": recall.top1, "low": low, "high": high, "printed": printed, "difference": difference}
            found.append(record | {"half_intervals": difference / ((high - low) / 2) if high > low else None})
    return found


def explain(
    comparisons: Sequence[dict], results: Sequence[RetrievalResult], numbers: Sequence[PublishedNumber]
) -> list[str]:
    """Returns possible explanations of the differences, one sentence each; none if no difference exceeds its interval.

    Args:
        comparisons: comparisons of this run.
        results: results of this run.
        numbers: published numbers of this model for all protocols.
    """
    exceeding = {
        c["benchmark"]: c["protocol"].split("/")[0].removeprefix("long-")
        for c in comparisons
        if c["half_intervals"] is None or abs(c["half_intervals"]) > 1
    }
    if not exceeding:
        return []
    lines, compared = [], {c["protocol"] for c in comparisons}
    for result in (r for r in results if r.title in exceeding):
        if result.truncated_share:
            cut = f"{100 * result.truncated_share:.1f}% of captions are truncated"
            lines.append(f"{result.title}: {cut}; another context length gives different numbers.")
        others = [n for n in numbers if exceeding[result.title] in n.protocol and n.protocol not in compared]
        if others:
            listed = ", ".join(f"{n.protocol} {n.i2t:.1f} / {n.t2i:.1f}" for n in others)
            lines.append(f"{result.title}: other protocols with this name have {listed}.")
    lines.append("Only --image-decoding exact, the default, gives the same pixels as in papers.")
    lines.append("Papers often evaluate in fp16 or AMP; compared with fp32, this changes about 1 in 1,000 queries.")
    lines.append("Captions are split and joined here (EVAL_DATASETS.md); Long-CLIP and its derivatives use them raw.")
    return lines


def published_rows(comparisons: Sequence[dict]) -> list[dict[str, str]]:
    """Returns the cells of a table, in percent and points."""
    rows = []
    for c in comparisons:
        row = {"benchmark": c["benchmark"], "": DIRECTIONS[c["direction"]], "measured": percent(c["measured"])}
        row |= {"published": percent(c["printed"]), "difference": points(c["difference"])}
        row["in half\nintervals"] = "-" if c["half_intervals"] is None else f"{c['half_intervals']:+.1f}"
        rows.append(row | {"source": f"{c['source']}; {c['note']}" if c["note"] else c["source"]})
    return rows
