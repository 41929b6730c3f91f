"""Flags of evaluation: benchmarks and output. Imports nothing heavy."""

import argparse

from dataloaders.registry import benchmarks, options_of, suites
from training.flags.effects import ALWAYS, EVALUATION, Condition, Effects, asks_about_texts
from training.flags.types import Flags, names, positive_numbers

_TEXT_FLAGS = ("--retrieval-lengths", "--retrieval-sentences", "--retrieval-sensitivity", "--diagnostics")
INSIGHT_FLAGS = (
    "--report",
    "--published",
    *_TEXT_FLAGS,
    "--save-features",
    "--rerank",
)

# Old spellings: flag -> (argparse's nargs, what to write).
_RENAMED = {
    "--docci-sentences": (0, "--protocol docci/test,docci/sentences"),
    "--karpathy-split": (None, "--protocol coco/karpathy-val,flickr30k/val"),
}


def _needs(flags: list[str]) -> Condition:
    """Returns the condition of an option that applies only to the benchmarks of these flags."""
    alone = len(flags) == 1  # then it is clear which flag is missing, so the command is refused
    advice = "; add it or omit both" if alone else ""
    return Condition(
        f"without {' or '.join(flags)}{advice}", lambda args: any(_value(args, flag) for flag in flags), refused=alone
    )


def benchmark_flags(*kinds: bool) -> list[str]:
    """Returns the flags of the retrieval benchmarks (kind False), of the zero-shot ones (True), or of both."""
    return [b.flag for kind in kinds or (False, True) for b in benchmarks() if b.classification == kind]


def has_retrieval(args: argparse.Namespace) -> bool:
    """Whether the flags name a retrieval benchmark."""
    return any(_value(args, flag) for flag in benchmark_flags(False))


_TEXT_MODEL_NEEDED = Condition(
    "for --features without --model and --pretrained, which encode the changed captions; add them or omit the flag",
    lambda args: not args.features or args.pretrained or ":" in args.model,
    refused=True,
)
_MODEL_NEEDED = Condition("with --features; omit it", lambda args: not args.features, refused=True)
_RETRIEVAL = Condition(
    "without a retrieval benchmark; name one", lambda args: has_retrieval(args) or args.features, refused=True
)
_NO_FEATURES = Condition("with --features: no image is encoded", lambda args: not args.features, refused=True)
_FIXED_WEIGHTS = Condition(
    "in training: weights change from one evaluation to the next", EVALUATION.holds, refused=True
)

EFFECTS: Effects = (
    (ALWAYS, " ".join((*benchmark_flags(), "--protocol", "--data-root"))),
    (Condition("without --data-root", lambda args: args.data_root), "--suite"),
    (EVALUATION, " ".join(INSIGHT_FLAGS)),
    (_TEXT_MODEL_NEEDED, " ".join(_TEXT_FLAGS)),
    (_MODEL_NEEDED, "--save-features --rerank"),
    (_RETRIEVAL, " ".join(INSIGHT_FLAGS)),
    (EVALUATION, "--features"),
    (_FIXED_WEIGHTS, "--feature-cache"),
    (_NO_FEATURES, "--feature-cache --image-cache"),
    (Condition("without a benchmark", lambda args: has_benchmark(args)), "--image-cache"),
    *((_needs(flags), o.flag) for o, flags in options_of(benchmarks()).items()),
    (Condition("without a benchmark", lambda args: has_benchmark(args)), "--allow-missing"),
)


def add_eval_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of evaluation flags; with `everything`, also flags that are rarely needed."""
    group = Flags(parser, "long text-image retrieval (any subset; see EVAL_DATASETS.md)")
    _add_benchmarks(group, "long")
    _add_reading_args(group)
    _add_benchmarks(Flags(parser, "short captions and zero-shot classification"), "short")
    group = Flags(parser, "your own pairs and features")
    _add_benchmarks(group, "own")
    _add_features_args(group)
    if everything:
        _add_insight_args(Flags(parser, "analysis (evaluation only)"))


def _add_benchmarks(group: Flags, name: str) -> None:
    """Adds the benchmark flags of one group, and each option after the last benchmark that uses it."""
    chosen = [b for b in benchmarks() if b.group == name]
    owners = options_of(chosen)
    for benchmark in chosen:
        group.add_argument(*benchmark.flags, metavar=benchmark.metavar, help=benchmark.help)
        for option in benchmark.options:
            if owners[option][-1] == benchmark.flag:
                group.add_argument(option.flag, *option.aliases, **option.keywords)


def _add_reading_args(group: Flags) -> None:
    group.text(
        "--data-root",
        "DIR",
        "evaluate every benchmark below DIR (layout: EVAL_DATASETS.md; DIR/dci, DIR/iiw, DIR/Urban1k, ...)",
    )
    group.choice("--suite", suites(), "all", "benchmarks of --data-root to evaluate; long: the four of the paper")
    group.text(
        "--protocol",
        "P,P",
        "variants of the benchmarks (default: the first of each): "
        + "; ".join(", ".join(b.protocols) for b in benchmarks() if len(b.protocols) > 1),
        default=(),
        type=names,
    )
    for flag, (nargs, advice) in _RENAMED.items():
        group.refused(flag, f" is now {advice}", f"is now {advice}", nargs)
    group.text(
        "--feature-cache",
        "DIR",
        "store features in DIR, and encode only what it does not contain for the same weights and preprocessing",
    )
    group.text(
        "--image-cache",
        "DIR",
        "store decoded and resized images in DIR (147 KiB each at 224 pixels), bit-identical for every model with "
        "the same image size",
    )
    group.switch(
        "--allow-missing", "evaluate only the pairs whose images exist and can be read; results then state their number"
    )


def _add_features_args(group: Flags) -> None:
    group.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NPZ",
        help="evaluate these features instead of a model, one benchmark per file (format: EVAL_DATASETS.md)",
    )


def _add_insight_args(group: Flags) -> None:
    group.switch("--report", "write LOGS/NAME/report.html, for browsing every query")
    group.text(
        "--published",
        "NAME",
        "compare with the published numbers of this model in the project's list, or of your own list FILE.json "
        "(default: the model with the same weights, or the same --model and tag)",
    )
    group.text(
        "--retrieval-lengths",
        "L,L",
        "R@1 with captions truncated to these numbers of tokens, e.g. 10,20,40,77,128,248; the effective length",
        default=(),
        type=positive_numbers,
    )
    group.text(
        "--retrieval-sentences",
        "N,N",
        "R@1 with the first N sentences of each caption",
        default=(),
        type=positive_numbers,
    )
    group.switch("--retrieval-sensitivity", "R@1 with sentences shuffled, and with one sentence dropped")
    group.switch(
        "--diagnostics",
        "R@1 with changed captions: shortened as by the two flags above, sentences dropped, moved, added; short "
        "queries; preference of correct to wrong sentences, HiMo, R@1 by position; one table, and one figure: the "
        "card",
    )
    group.count(
        "--rerank",
        None,
        "score the first K captions of each image again with FLAIR's text-conditioned pooling (published: 128)",
        metavar="K",
    )
    group.switch("--save-features", "write LOGS/NAME/features/KEY.npz, for --features")


def has_benchmark(args: argparse.Namespace) -> bool:
    """Whether the flags name a benchmark."""
    return any(_value(args, flag) for flag in benchmark_flags())


def _value(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag[2:].replace("-", "_"))


def validate_eval_args(args: argparse.Namespace) -> None:
    """Checks the evaluation flags.

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
            raise ValueError(f"--protocol {protocol}: no effect without {known[protocol]}; add it or omit both")
    if args.features:
        flags = [*benchmark_flags(), "--train-data", "--val-data"]
        flags += [] if asks_about_texts(args) else ["--pretrained"]
        others = [flag for flag in flags if _value(args, flag)]
        if others:
            raise ValueError(f"--features provides encoded images and captions: omit {', '.join(others)}")
