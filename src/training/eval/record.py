"""What an evaluation found, as values with names and types, and the one place that turns it into JSON.

JSON keys are the published ones: ``dci-retrieval-i2t-top1``, ``imagenet-zeroshot-val-top1``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

DIRECTIONS = {"i2t": "I2T", "t2i": "T2I"}


@dataclass(frozen=True)
class Recall:
    """Of the queries of one direction; fractions.

    Attributes:
        top1, top5, top10: share of queries with a right answer among the first k.
        top1_ci95: 95% bootstrap interval of `top1`, [low, high].
        mean_rank, median_rank: of the first right answer, from 1.
    """

    top1: float
    top5: float
    top10: float
    top1_ci95: tuple[float, float]
    mean_rank: float
    median_rank: float

    @classmethod
    def of(cls, summary: dict) -> "Recall":
        """Takes what `metrics.summarise` returns."""
        return cls(**{field.name: summary[_json_name(field.name)] for field in fields(cls)})

    def to_json(self) -> dict[str, object]:
        """Returns the values by their published names."""
        return {_json_name(field.name): getattr(self, field.name) for field in fields(self)}


def _json_name(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Result:
    """What results of all kinds of benchmarks share.

    Attributes:
        title: heading in tables.
        key: prefix of its JSON keys.
        num_pairs: pairs (retrieval) or images (classification) that were evaluated.
        num_expected: of the complete benchmark.
        num_missing, num_broken: left out, because there is no file, or an unreadable one.
    """

    title: str
    key: str
    num_pairs: int
    num_expected: int
    num_missing: int
    num_broken: int

    @property
    def is_complete(self) -> bool:
        """Tells whether nothing was left out."""
        return self.num_pairs == self.num_expected

    @property
    def pairs(self) -> str:
        """``1,000`` for a complete benchmark, ``9,412 of 10,000`` for part of one."""
        whole = f"{self.num_pairs:,}"
        return whole if self.is_complete else f"{whole} of {self.num_expected:,}"


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Of one retrieval benchmark.

    Attributes:
        protocol: name of the variant; empty for a user's own pairs.
        fingerprint: of the exact list of image names and captions.
        num_images: distinct images of it.
        i2t, t2i: recall by images and by captions.
        truncated_share: share of captions that the tokenizer cut; None if unknown.
        truncated_mean_tokens_lost: mean number of tokens that a cut caption lost; None if unknown.
    """

    protocol: str
    fingerprint: str
    num_images: int
    i2t: Recall
    t2i: Recall
    truncated_share: float | None
    truncated_mean_tokens_lost: float | None

    def recall(self, direction: str) -> Recall:
        """Returns that of one of `DIRECTIONS`."""
        return {"i2t": self.i2t, "t2i": self.t2i}[direction]

    @property
    def mean_top1(self) -> float:
        """R@1, mean of both directions."""
        return (self.i2t.top1 + self.t2i.top1) / 2

    def to_json(self) -> dict[str, object]:
        """Returns the published keys with their values."""
        flat = {
            f"{self.key}-{direction}-{name}": value
            for direction in DIRECTIONS
            for name, value in self.recall(direction).to_json().items()
        }
        counts = ("num_images", "num_pairs", "num_expected", "num_missing", "num_broken")
        others = ("title", "protocol", "fingerprint", "truncated_share", "truncated_mean_tokens_lost")
        flat |= {f"{self.key}-{_json_name(name)}": getattr(self, name) for name in counts + others}
        return flat | {f"{self.key}-pairs": f"{self.num_pairs:,} of {self.num_expected:,} pairs"}


TEMPLATES = "open_clip's class names and templates"


@dataclass(frozen=True)
class ClassificationResult(Result):
    """Of one set of images with classes; fractions.

    Attributes:
        top1, top5: share of images whose class is among the first k.
        top1_ci95: 95% bootstrap interval of `top1`, [low, high].
        prompts: what the classes are described by.
    """

    top1: float
    top5: float
    top1_ci95: tuple[float, float]
    prompts: str = TEMPLATES

    def to_json(self) -> dict[str, object]:
        """Returns open_clip's keys with their values, and counts."""
        flat = {
            f"{self.key}-{_json_name(name)}": getattr(self, name)
            for name in ("top1", "top5", "top1_ci95", "title", "prompts")
        }
        flat[f"{self.key}-num-images"] = self.num_pairs
        return flat | {f"{self.key}-images": f"{self.num_pairs:,} of {self.num_expected:,} images"}


def describe_pairs(title: str, protocol: str, fingerprint: str) -> str:
    """``DCI: dci/short+extra, pairs 0f3a..``."""
    return f"{title}: {protocol or 'your own pairs'}, pairs {fingerprint}"


def to_json(results: Sequence[RetrievalResult | ClassificationResult]) -> dict[str, object]:
    """Returns the keys of all benchmarks of a run, as a line of results.jsonl and a training's log hold them."""
    return {name: value for result in results for name, value in result.to_json().items()}
