"""Flags of evaluation: benchmarks, and what is written about them. Imports nothing heavy."""

import argparse
import os

from training.flags.types import names, positive_numbers

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
# Flag -> the flag without which it says nothing.
_NEEDS = {
    "share4v_anno": "share4v_retrieval",
    "iiw_anno": "iiw_retrieval",
    "docci_sentences": "docci_retrieval",
    "coco_anno": "coco_retrieval",
    "flickr30k_anno": "flickr30k_retrieval",
}


def add_eval_args(parser: argparse.ArgumentParser) -> None:
    """Adds evaluation's groups of flags."""
    _add_long_args(parser.add_argument_group("long text-image retrieval (any subset; see EVAL_DATASETS.md)"))
    _add_short_args(parser.add_argument_group("short captions and zero-shot classification"))
    _add_own_args(parser.add_argument_group("your own pairs and features"))
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
    group.add_argument("--docci-sentences", action="store_true", help="DOCCI also with each sentence as a caption")
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="keep features there, and encode only what is not there yet for the same weights and preprocessing",
    )
    group.add_argument(
        "--allow-missing",
        action="store_true",
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
    group.add_argument("--report", action="store_true", help="write LOGS/NAME/report.html, to look at every query")
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
        "--retrieval-sensitivity", action="store_true", help="R@1 with sentences shuffled, and with one dropped"
    )
    group.add_argument("--save-features", action="store_true", help="write LOGS/NAME/features/KEY.npz, for --features")


def has_benchmark(args: argparse.Namespace) -> bool:
    """Tells whether any benchmark is asked for."""
    return any(_value(args, flag) for flag in RETRIEVAL_FLAGS + ZERO_SHOT_FLAGS)


def _value(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag[2:].replace("-", "_"))


def _validate_features_args(args: argparse.Namespace) -> None:
    others = [
        flag for flag in (*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS, "--train-data", "--pretrained") if _value(args, flag)
    ]
    if others:
        raise ValueError(f"--features brings images and captions already encoded: leave out {', '.join(others)}")
    without_model = [flag for flag in INSIGHT_FLAGS if _value(args, flag) and flag != "--report"]
    if without_model:
        raise ValueError(f"{', '.join(without_model)}: no effect on --features, which come without a model; leave out")


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
    for flag, needs in _NEEDS.items():
        if getattr(args, flag) and not getattr(args, needs):
            raise ValueError(f"--{flag} has no effect without --{needs}; add it or leave both".replace("_", "-"))
    if args.features:
        _validate_features_args(args)
    if args.feature_cache and args.train_data:
        raise ValueError("--feature-cache has no effect in training: weights change from one evaluation to the next")
    if args.text_batch_size and args.train_data:
        raise ValueError("--text-batch-size has no effect in training, where captions come with their images")
    if args.feature_cache and args.features:
        raise ValueError("--feature-cache has no effect with --features: nothing is encoded")
    insight = [flag for flag in INSIGHT_FLAGS if _value(args, flag)]
    if args.train_data and insight:
        raise ValueError(f"{', '.join(insight)}: no effect in training; evaluate a checkpoint")
    if insight and not any(_value(args, flag) for flag in (*RETRIEVAL_FLAGS, "--features")):
        raise ValueError(f"{', '.join(insight)}: no effect without a retrieval benchmark; name one")
    if os.path.exists(args.logs) and not os.path.isdir(args.logs):
        raise ValueError(f"--logs {args.logs}: is a file, expected a folder")
