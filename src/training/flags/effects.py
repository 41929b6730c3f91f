"""Conditions under which flags have an effect.

Each file of flags has a table ``EFFECTS`` of (condition, flags). A flag that differs from its default although one of
its conditions does not hold is reported once: as a usage error if the condition is `refused`, otherwise as a warning.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


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


Effects = tuple[tuple[Condition, str], ...]

ALWAYS = Condition("", lambda args: True)
TRAINING = Condition("without --train-data", lambda args: args.train_data)
DATA = Condition("without --train-data or --val-data", lambda args: args.train_data or args.val_data)
DATA_MEANT = Condition(DATA.otherwise, DATA.holds, refused=True)
TRAINING_MEANT = Condition("without --train-data", lambda args: args.train_data, refused=True)
STEPS = Condition("with --extract-image-features, which does not train", lambda args: not args.extract_image_features)
STEPS_MEANT = Condition(STEPS.otherwise, STEPS.holds, refused=True)
EVALUATION = Condition("in training; evaluate a checkpoint", lambda args: not args.train_data, refused=True)
MODEL = Condition("with --features, which need no model", lambda args: not args.features or asks_about_texts(args))


def asks_about_texts(args: argparse.Namespace) -> bool:
    """Whether the flags ask for changed captions, which have to be encoded."""
    lengths = args.retrieval_lengths or args.retrieval_sentences or args.retrieval_sensitivity
    return bool(lengths or args.diagnostics)


def idle_flags(
    args: argparse.Namespace, defaults: Mapping[str, object], effects: Iterable[tuple[Condition, str]]
) -> dict[Condition, list[str]]:
    """Finds flags that were given but have no effect.

    Args:
        args: all flags.
        defaults: default of each flag, by its name in `args`.
        effects: the tables of all files of flags; a flag in several rows needs all their conditions.

    Returns:
        Each condition that does not hold -> the flags for which it is the first such condition.
    """
    idle: dict[Condition, list[str]] = {}
    reported: set[str] = set()
    for condition, flags in effects:
        names = {flag: flag[2:].replace("-", "_") for flag in flags.split() if flag not in reported}
        given = [flag for flag, name in names.items() if getattr(args, name) != defaults[name]]
        if given and not condition.holds(args):  # in this order, because some conditions look into files
            idle.setdefault(condition, []).extend(given)
            reported.update(given)
    return idle


def describe_idle(condition: Condition, flags: list[str]) -> str:
    """Returns a line about flags without an effect."""
    return f"{', '.join(flags)}: no effect {condition.otherwise}"
