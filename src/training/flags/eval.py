"""Flags of evaluation: benchmarks, and what is written about them. Imports nothing heavy."""

import argparse

from dataloaders.registry import benchmarks, options_of, suites
from training.flags.effects import ALWAYS, EVALUATION, Condition, Effects, asks_about_texts
from training.flags.types import Switch, names, positive, positive_numbers

RETRIEVAL_FLAGS = tuple(b.flag for b in benchmarks() if not b.classification)
ZERO_SHOT_FLAGS = tuple(b.flag for b in benchmarks() if b.classification)
_TEXT_FLAGS = ("--retrieval-lengths", "--retrieval-sentences", "--retrieval-sensitivity", "--diagnostics")
INSIGHT_FLAGS = (
    "--report",
    "--published",
    *_TEXT_FLAGS,
    "--save-features",
    "--rerank",
)


def _needs(flags: list[str]) -> Condition:
    """Condition of an option that says how to read the data of these flags."""
    alone = len(flags) == 1  # nothing else could have been meant: refused
    advice = "; add it or leave both" if alone else ""
    return Condition(
        f"without {' or '.join(flags)}{advice}", lambda args: any(_value(args, flag) for flag in flags), refused=alone
    )


def has_retrieval(args: argparse.Namespace) -> bool:
    """Tells whether any retrieval benchmark is asked for."""
    return any(_value(args, flag) for flag in RETRIEVAL_FLAGS)


_TEXT_MODEL_NEEDED = Condition(
    "on --features without --model and --pretrained, which encode the changed captions; add them or leave out",
    lambda args: not args.features or args.pretrained or ":" in args.model,
    refused=True,
)
_MODEL_NEEDED = Condition("on --features; leave out", lambda args: not args.features, refused=True)
_RETRIEVAL = Condition(
    "without a retrieval benchmark; name one", lambda args: has_retrieval(args) or args.features, refused=True
)
_NO_FEATURES = Condition("with --features: no image is encoded", lambda args: not args.features, refused=True)
_FIXED_WEIGHTS = Condition(
    "in training: weights change from one evaluation to the next", EVALUATION.holds, refused=True
)

EFFECTS: Effects = (
    (ALWAYS, " ".join((*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS, "--protocol", "--data-root"))),
    (Condition("without --data-root", lambda args: args.data_root), "--suite"),
    (EVALUATION, " ".join(INSIGHT_FLAGS)),
    (_TEXT_MODEL_NEEDED, " ".join(_TEXT_FLAGS)),
    (_MODEL_NEEDED, "--save-features --rerank"),
    (_RETRIEVAL, " ".join(INSIGHT_FLAGS)),
    (EVALUATION, "--features"),
    (_FIXED_WEIGHTS, "--feature-cache"),
    (_NO_FEATURES, "--feature-cache --image-cache"),
    (Condition("without a benchmark", lambda args: has_benchmark(args)), "--image-cache"),
    *((_needs(flags), o.flag) for o, flags in options_of(benchmarks()).items() if not o.of_training),
    (Condition("without a benchmark", lambda args: has_benchmark(args)), "--allow-missing"),
)


def add_eval_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds evaluation's groups of flags; `everything`: also those that few evaluations need."""
    group = parser.add_argument_group("long text-image retrieval (any subset; see EVAL_DATASETS.md)")
    _add_benchmarks(group, "long")
    _add_reading_args(group)
    _add_benchmarks(parser.add_argument_group("short captions and zero-shot classification"), "short")
    group = parser.add_argument_group("your own pairs and features")
    _add_benchmarks(group, "own")
    _add_features_args(group)
    if everything:
        _add_insight_args(parser.add_argument_group("insight (evaluation only)"))


def _add_benchmarks(group: argparse._ArgumentGroup, name: str) -> None:
    """Adds the flags of the benchmarks of one group, each option after the last benchmark that has it."""
    chosen = [b for b in benchmarks() if b.group == name]
    owners = options_of(chosen)
    for benchmark in chosen:
        group.add_argument(benchmark.flag, metavar=benchmark.metavar, help=benchmark.help)
        for option in benchmark.options:
            if not option.of_training and owners[option][-1] == benchmark.flag:
                switch = {"action": Switch} if option.is_switch else {}
                group.add_argument(option.flag, **option.keywords, **switch)


def _add_reading_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="evaluate every benchmark below it, in the places of EVAL_DATASETS.md: DIR/dci, DIR/iiw, DIR/Urban1k, ..",
    )
    group.add_argument(
        "--suite",
        choices=suites(),
        default="all",
        help="which of them; long: the four of the paper (default: %(default)s)",
    )
    group.add_argument(
        "--protocol",
        type=names,
        default=(),
        metavar="P,P",
        help="variants of the benchmarks in place of their first one: "
        + "; ".join(", ".join(b.protocols) for b in benchmarks() if len(b.protocols) > 1),
    )
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="keep features there, and encode only what is not there yet for the same weights and preprocessing",
    )
    group.add_argument(
        "--image-cache",
        metavar="DIR",
        help="keep decoded and resized images there (147 KiB each at 224 pixels), equal to the last bit, for every "
        "model of the same image size",
    )
    group.add_argument(
        "--allow-missing",
        action=Switch,
        help="evaluate the pairs whose images are there and readable; every result then gives the count",
    )


def _add_features_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NPZ",
        help="evaluate these features in place of a model, one benchmark a file (form: EVAL_DATASETS.md)",
    )


def _add_insight_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--report", action=Switch, help="write LOGS/NAME/report.html, to look at every query")
    group.add_argument(
        "--published",
        metavar="NAME",
        help="show printed numbers of this model of the project's list, or of your own list FILE.json, beside measured "
        "ones (default: the model that has the same weights, or the same --model and tag)",
    )
    group.add_argument(
        "--retrieval-lengths",
        type=positive_numbers,
        default=(),
        metavar="L,L",
        help="R@1 with captions cut to these numbers of tokens, e.g. 10,20,40,77,128,248, and the effective length",
    )
    group.add_argument(
        "--retrieval-sentences", type=positive_numbers, default=(), metavar="N,N", help="R@1 with their first sentences"
    )
    group.add_argument(
        "--retrieval-sensitivity", action=Switch, help="R@1 with sentences shuffled, and with one dropped"
    )
    group.add_argument(
        "--diagnostics",
        action=Switch,
        help="what dropped, moved and neutral sentences cost, whether similarity grows with each sentence (HiMo), R@1 "
        "by the position of a sentence, and a long-text card of all that; with the curves of both flags above",
    )
    group.add_argument(
        "--rerank",
        type=positive,
        metavar="K",
        help="with FLAIR's text-conditioned pooling: score the first K captions of each image anew, 128 as published",
    )
    group.add_argument("--save-features", action=Switch, help="write LOGS/NAME/features/KEY.npz, for --features")


def has_benchmark(args: argparse.Namespace) -> bool:
    """Tells whether any benchmark is asked for."""
    return any(_value(args, flag) for flag in RETRIEVAL_FLAGS + ZERO_SHOT_FLAGS)


def _value(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag[2:].replace("-", "_"))


def validate_eval_args(args: argparse.Namespace) -> None:
    """Checks evaluation's flags.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    for benchmark in benchmarks():
        for flag, what in benchmark.requires:
            if _value(args, benchmark.flag) and not _value(args, flag):
                raise ValueError(f"{benchmark.flag} needs {flag}, {what}")
    known = {protocol: b.flag for b in benchmarks() for protocol in b.protocols}
    for protocol in args.protocol:
        if protocol not in known:
            raise ValueError(f"--protocol {protocol}: expected one of {', '.join(known)}")
        if not _value(args, known[protocol]):
            raise ValueError(f"--protocol {protocol}: no effect without {known[protocol]}; add it or leave both")
    if args.features:
        flags = [*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS, "--train-data"]
        flags += [] if asks_about_texts(args) else ["--pretrained"]
        others = [flag for flag in flags if _value(args, flag)]
        if others:
            raise ValueError(f"--features brings images and captions already encoded: leave out {', '.join(others)}")
