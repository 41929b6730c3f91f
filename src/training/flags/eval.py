"""Flags of evaluation: benchmarks, and what is written about them. Imports nothing heavy."""

import argparse

from training.flags.effects import ALWAYS, EVALUATION, MODEL, Condition, Effects
from training.flags.types import Switch, names, positive_numbers

RETRIEVAL_FLAGS = (
    "--dci-retrieval",
    "--iiw-retrieval",
    "--share4v-retrieval",
    "--urban1k-retrieval",
    "--docci-retrieval",
    "--coco-retrieval",
    "--flickr30k-retrieval",
    "--retrieval-csv",
    "--retrieval-wds",
)
ZERO_SHOT_FLAGS = ("--imagenet-val", "--imagenet-v2")
INSIGHT_FLAGS = (
    "--report",
    "--retrieval-lengths",
    "--retrieval-sentences",
    "--retrieval-sensitivity",
    "--save-features",
)


def _needs(flag: str) -> Condition:
    """Condition of a flag that says how to read another one's data."""
    name = flag[2:].replace("-", "_")
    return Condition(f"without {flag}; add it or leave both", lambda args: getattr(args, name), refused=True)


def has_retrieval(args: argparse.Namespace) -> bool:
    """Tells whether any retrieval benchmark is asked for."""
    return any(_value(args, flag) for flag in RETRIEVAL_FLAGS)


_OWN_PAIRS = Condition(
    "without --retrieval-csv or --retrieval-wds", lambda args: args.retrieval_csv or args.retrieval_wds
)
_MODEL_NEEDED = Condition("on --features, which come without a model; leave out", MODEL.holds, refused=True)
_RETRIEVAL = Condition(
    "without a retrieval benchmark; name one", lambda args: has_retrieval(args) or args.features, refused=True
)
_NO_FEATURES = Condition("with --features: nothing is encoded", MODEL.holds, refused=True)
_FIXED_WEIGHTS = Condition(
    "in training: weights change from one evaluation to the next", EVALUATION.holds, refused=True
)

EFFECTS: Effects = (
    (ALWAYS, " ".join((*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS))),
    (EVALUATION, " ".join(INSIGHT_FLAGS)),
    (_MODEL_NEEDED, " ".join(flag for flag in INSIGHT_FLAGS if flag != "--report")),
    (_RETRIEVAL, " ".join(INSIGHT_FLAGS)),
    (EVALUATION, "--features"),
    (_FIXED_WEIGHTS, "--feature-cache"),
    (_NO_FEATURES, "--feature-cache"),
    (_needs("--share4v-retrieval"), "--share4v-anno --share4v-val-num"),
    (_needs("--iiw-retrieval"), "--iiw-anno"),
    (_needs("--docci-retrieval"), "--docci-sentences"),
    (_needs("--coco-retrieval"), "--coco-anno"),
    (_needs("--flickr30k-retrieval"), "--flickr30k-anno"),
    (
        Condition(
            "without --coco-retrieval or --flickr30k-retrieval", lambda a: a.coco_retrieval or a.flickr30k_retrieval
        ),
        "--karpathy-split",
    ),
    (_OWN_PAIRS, "--retrieval-caption-keys --retrieval-caption-rule"),
    (Condition("without a benchmark", lambda args: has_benchmark(args)), "--allow-missing"),
)


def add_eval_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds evaluation's groups of flags; `everything`: also those that few evaluations need."""
    _add_long_args(parser.add_argument_group("long text-image retrieval (any subset; see EVAL_DATASETS.md)"))
    _add_short_args(parser.add_argument_group("short captions and zero-shot classification"))
    _add_own_args(parser.add_argument_group("your own pairs and features"))
    if everything:
        _add_insight_args(parser.add_argument_group("insight (evaluation only)"))


def _add_long_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dci-retrieval", metavar="DIR", help="DCI: folder with densely_captioned_images/")
    group.add_argument("--iiw-retrieval", metavar="DIR", help="ImageInWords: folder with docci/, docci_aar/, dci/")
    group.add_argument(
        "--iiw-anno",
        metavar="DIR",
        help="folder with DOCCI_Test/, IIW-400/, DCI_Test/data.jsonl (default: the IIW folder)",
    )
    group.add_argument("--share4v-retrieval", metavar="DIR", help="ShareGPT4V: folder with SA-1B images, in any tree")
    group.add_argument("--share4v-anno", metavar="FILE", help="its list of captions (dataloaders.prepare share4v)")
    group.add_argument(
        "--share4v-val-num",
        type=positive_numbers,
        default=(1000, 10000),
        metavar="N,N",
        help="sizes to evaluate, from the start of the list (default: 1000,10000)",
    )
    group.add_argument("--urban1k-retrieval", metavar="DIR", help="Urban1k: folder with image/ and caption/")
    group.add_argument("--docci-retrieval", metavar="DIR", help="DOCCI's test split: folder with its .jsonlines")
    group.add_argument("--docci-sentences", action=Switch, help="DOCCI also with each sentence as a caption")
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="keep features there, and encode only what is not there yet for the same weights and preprocessing",
    )
    group.add_argument(
        "--allow-missing",
        action=Switch,
        help="evaluate the pairs whose images are there and readable; every result then gives the count",
    )


def _add_short_args(group: argparse._ArgumentGroup) -> None:
    for key, title in (("coco", "COCO"), ("flickr30k", "Flickr30k")):
        group.add_argument(f"--{key}-retrieval", metavar="DIR", help=f"{title}: folder with images and captions")
        group.add_argument(f"--{key}-anno", metavar="FILE", help=f"dataset_{key}.json (default: looked for in DIR)")
    group.add_argument(
        "--karpathy-split", default="test", choices=("test", "val"), help="of COCO and Flickr30k (default: %(default)s)"
    )
    group.add_argument("--imagenet-val", metavar="DIR", help="ImageNet-1k: folder with a folder per class (n01440764)")
    group.add_argument("--imagenet-v2", metavar="DIR", help="ImageNet-v2: folder with numbered folders")


def _add_own_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--retrieval-csv", metavar="FILE", help="table of pairs, .csv, .tsv or .parquet (--csv-img-key)")
    group.add_argument(
        "--retrieval-wds", metavar="TARS", help="local tar shards of pairs: '{000..004}.tar' or a folder"
    )
    group.add_argument(
        "--retrieval-caption-keys",
        type=names,
        default=("caption",),
        metavar="KEYS",
        help="their captions: columns of the table, keys in a shard's .json (default: caption)",
    )
    group.add_argument(
        "--retrieval-caption-rule",
        default="raw",
        choices=("raw", "long"),
        help="captions as they are, or split and joined as in the long benchmarks (default: %(default)s)",
    )

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
    if args.share4v_retrieval and not args.share4v_anno:
        raise ValueError(
            "--share4v-retrieval needs --share4v-anno FILE, the list of captions; "
            "python -m dataloaders.prepare share4v makes it (see EVAL_DATASETS.md)"
        )
    if args.features:
        flags = (*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS, "--train-data", "--pretrained")
        others = [flag for flag in flags if _value(args, flag)]
        if others:
            raise ValueError(f"--features brings images and captions already encoded: leave out {', '.join(others)}")
