"""Conditions under which flags have an effect, and what else the flags say about a command.

Each flag names its conditions in the YAML files of this folder. A flag that differs from its default although one of
its conditions does not hold is reported once: as a usage error if the condition is refused, otherwise as a warning.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dataloaders.registry import benchmarks, destination
from training.data.captions import Entry, parse_views, views_by_flags
from training.readers.table_files import names_csv, names_tables


@dataclass(frozen=True)
class Condition:
    """A condition under which some flags have an effect.

    Attributes:
        otherwise: text that completes "--flag: no effect ...", such as "without --train-data".
        holds: parsed flags -> whether the condition holds.
        refused: stop with a usage error instead of a warning.
    """

    otherwise: str
    holds: Callable[[argparse.Namespace], object]
    refused: bool = False


def value_of(args: argparse.Namespace, flag: str) -> Any:
    """Returns the value of a flag, by its name with hyphens."""
    return getattr(args, destination(flag))


def benchmark_flags(*kinds: bool) -> list[str]:
    """Returns the flags of the retrieval benchmarks (kind False), of the zero-shot ones (True), or of both."""
    return [b.flag for kind in kinds or (False, True) for b in benchmarks() if b.classification == kind]


def has_benchmark(args: argparse.Namespace, *kinds: bool) -> bool:
    """Returns whether the flags name a benchmark; see `benchmark_flags` for the kinds."""
    return any(value_of(args, flag) for flag in benchmark_flags(*kinds))


def asks_about_texts(args: argparse.Namespace) -> bool:
    """Returns whether the flags ask for changed captions, which have to be encoded."""
    lengths = args.retrieval_lengths or args.retrieval_sentences or args.retrieval_sensitivity
    return bool(lengths or args.diagnostics)


def caption_entries(args: argparse.Namespace) -> tuple[Entry, ...]:
    """Returns the texts of a sample, from --text-views or the flags that are equivalent to it."""
    by_flags = views_by_flags(args.captions, args.num_long_captions, args.sub_caption_sentences)
    return parse_views(args.text_views or by_flags)


def reads(entries: Iterable[Entry], kind: str) -> bool:
    """Returns whether any of the texts can come from captions of this kind, ``short`` or ``long``."""
    views = [view for entry in entries for view in entry.views]
    return any(
        (view.uses_long if kind == "long" else kind in (view.name, view.pool))
        or (view.name == "sentences" and view.pool == "all")
        for view in views
    )


def _has_shards(args: argparse.Namespace) -> bool:
    """Returns whether the training data are read in order: shards, or tables that contain the images."""
    if not names_tables(args.train_data):
        return True
    from training.data.tables import embedded_sources  # imports pyarrow, which would slow down --help

    try:
        return bool(embedded_sources(args.train_data, args.csv_img_key))
    except (ValueError, OSError):
        return True  # reported when the data are opened


def _any_source(args: argparse.Namespace, is_it: Callable[[str | None], bool]) -> bool:
    return any(map(is_it, (args.train_data, args.val_data, args.retrieval_table)))


# Name in the YAML files -> text after "--flag: no effect", and the condition itself.
_CONDITIONS: dict[str, tuple[str, Callable[[argparse.Namespace], object]]] = {
    "always": ("", lambda args: True),
    "data": ("without --train-data or --val-data", lambda args: args.train_data or args.val_data),
    "steps": ("with --extract-image-features, which does not train", lambda args: not args.extract_image_features),
    "evaluation": ("in training; evaluate a checkpoint", lambda args: not args.train_data),
    "fixed-weights": ("in training: weights change from one evaluation to the next", lambda args: not args.train_data),
    "separate-captions": ("in training, where captions come with their images", lambda args: not args.train_data),
    "model": ("with --features, which need no model", lambda args: not args.features or asks_about_texts(args)),
    "no-features": ("with --features; omit it", lambda args: not args.features),
    "encodes-images": ("with --features: no image is encoded", lambda args: not args.features),
    "encodes-texts": (
        "for --features without --model and --pretrained, which encode the changed captions; add them or omit the flag",
        lambda args: not args.features or args.pretrained or ":" in args.model,
    ),
    "benchmark": ("without a benchmark", has_benchmark),
    "named-benchmark": ("without a benchmark, such as --urban1k-retrieval", has_benchmark),
    "retrieval": ("without a retrieval benchmark; name one", lambda args: has_benchmark(args, False) or args.features),
    "table": (
        "without a table (.csv, .tsv, .json, .jsonl, .parquet or .arrow)",
        lambda args: _any_source(args, names_tables),
    ),
    "csv": ("without a .csv or .tsv table", lambda args: _any_source(args, names_csv)),
    "shards": ("for a table of image paths, whose rows are all shuffled", _has_shards),
    "own-data": (
        "without --train-data, --val-data, --retrieval-table or --retrieval-wds",
        lambda args: args.train_data or args.val_data or args.retrieval_table or args.retrieval_wds,
    ),
    "no-views": ("with --text-views; omit one or the other", lambda args: not args.text_views),
    "long": ("without a text from long captions; see --text-views", lambda args: reads(caption_entries(args), "long")),
    "short": (
        "without a text from short captions; see --text-views",
        lambda args: reads(caption_entries(args), "short"),
    ),
    "several": (
        "with a single caption per sample, whose loss is not weighted",
        lambda args: sum(entry.count for entry in caption_entries(args)) > 1,
    ),
    "scheduled": ("with --skip-scheduler", lambda args: not args.skip_scheduler),
    "cooldown": (
        "without --lr-scheduler const-cooldown",
        lambda args: args.lr_scheduler == "const-cooldown" and args.train_data,
    ),
    "timm": ("with --opt adamw", lambda args: args.opt != "adamw"),
    "not-compiled": (
        "with --torchcompile, which may choose other kernels at each start",
        lambda args: not args.torchcompile,
    ),
    "mid-epoch": (
        "with --save-every-minutes 0 and --save-every-steps 0, which never save within an epoch",
        lambda args: args.save_every_minutes or args.save_every_steps,
    ),
    "whole-epochs": ("with --save-frequency 0, which never saves epoch_N.pt", lambda args: args.save_frequency),
}


@cache
def needs(*flags: str, refused: bool = False) -> Condition:
    """Returns the condition of a flag that applies only beside one of these flags."""
    advice = "; add it or omit both" if refused else ""
    return Condition(
        f"without {' or '.join(flags)}{advice}", lambda args: any(value_of(args, flag) for flag in flags), refused
    )


@cache
def conditions(names: str) -> tuple[Condition, ...]:
    """Parses ``effect:`` of a flag: ``NAME, --FLAG, ...``, all of which must hold.

    Args:
        names: a name of the list above, or a flag that must be given; with ``!`` behind it is refused otherwise.
    """
    found = []
    for name in names.split(", "):
        word, refused = name.rstrip("!"), name.endswith("!")
        found.append(
            needs(word, refused=refused) if word.startswith("--") else Condition(*_CONDITIONS[word], refused=refused)
        )
    return tuple(found)


def idle_flags(
    args: argparse.Namespace, defaults: Mapping[str, object], effects: Mapping[str, Sequence[Condition]]
) -> dict[Condition, list[str]]:
    """Finds flags that were given but have no effect.

    Args:
        args: all flags.
        defaults: default of each flag, by its name in `args`.
        effects: flag -> its conditions.

    Returns:
        Each condition that does not hold -> the flags for which it is the first such condition.
    """
    idle: dict[Condition, list[str]] = {}
    holds = cache(lambda condition: condition.holds(args))  # some conditions look into files
    for flag, needed in effects.items():
        if value_of(args, flag) != defaults[destination(flag)]:
            failed = next((condition for condition in needed if not holds(condition)), None)
            if failed:
                idle.setdefault(failed, []).append(flag)
    return idle


def describe_idle(condition: Condition, flags: list[str]) -> str:
    """Returns a line about flags without an effect."""
    return f"{', '.join(flags)}: no effect {condition.otherwise}"
