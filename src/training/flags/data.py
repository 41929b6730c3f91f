"""Flags of training data: sources of samples, augmentation of images, selection of captions."""

import argparse
from collections.abc import Iterable

from training.data.captions import LONG_KEYS, RAW_KEYS
from training.data.mixing import SHUFFLE_SHARDS, SHUFFLE_WINDOW
from training.data.views import Entry, parse_views, views_by_flags
from training.flags.effects import TRAINING, TRAINING_MEANT, Condition
from training.flags.types import Switch, names, not_negative, positive
from training.readers.samples import INDEX_CACHE
from training.readers.table_files import names_csv, names_tables

_TABLE = Condition(
    "without a table (.csv, .tsv, .json, .jsonl, .parquet or .arrow)",
    lambda args: any(map(names_tables, (args.train_data, args.val_data, args.retrieval_table))),
)
_CSV = Condition(
    "without a .csv or .tsv table",
    lambda args: any(map(names_csv, (args.train_data, args.val_data, args.retrieval_table))),
)
_SHARDS = Condition("for a table of image paths, whose rows are all shuffled", lambda args: not _has_paths(args))
LONG = Condition(
    "without a text from long captions; see --text-views", lambda args: reads(caption_entries(args), "long")
)
_SHORT = Condition(
    "without a text from short captions; see --text-views", lambda args: reads(caption_entries(args), "short")
)
_OWN_DATA = Condition(
    "without --train-data, --retrieval-table or --retrieval-wds",
    lambda args: args.train_data or args.retrieval_table or args.retrieval_wds,
)
_BY_FLAGS = Condition("with --text-views; omit one or the other", lambda args: not args.text_views, refused=True)

EFFECTS = (
    (TRAINING_MEANT, "--val-data --extract-image-features"),
    (_TABLE, "--csv-img-key"),
    (_CSV, "--csv-separator"),
    (TRAINING, "--train-data --train-num-samples --dataset-resampled --train-data-upsampling-factors"),
    (TRAINING, "--train-sizes --index-cache"),
    (
        TRAINING,
        "--shuffle-window --shuffle-shards --feature-views --strong-augment --aug-cfg --num-long-captions --captions",
    ),
    (TRAINING, "--sub-caption-sentences --raw-caption-keys --short-caption-keys --long-caption-keys"),
    (_SHARDS, "--shuffle-window --shuffle-shards --train-sizes --index-cache"),
    (TRAINING, "--text-views"),
    (_BY_FLAGS, "--num-long-captions --captions --sub-caption-sentences"),
    (LONG, "--num-long-captions --sub-caption-sentences --long-caption-keys"),
    (_SHORT, "--short-caption-keys"),
    (_OWN_DATA, "--caption-lists --caption-lines"),
)


def caption_entries(args: argparse.Namespace) -> tuple[Entry, ...]:
    """Returns the texts of a sample, from --text-views or the flags that are equivalent to it."""
    by_flags = views_by_flags(args.captions, args.num_long_captions, args.sub_caption_sentences)
    return parse_views(args.text_views or by_flags)


def reads(entries: Iterable[Entry], kind: str) -> bool:
    """Whether any of the texts can come from captions of this kind, ``short`` or ``long``."""
    views = [view for entry in entries for view in entry.views]
    return any(
        (view.uses_long if kind == "long" else kind in (view.name, view.pool))
        or (view.name == "sentences" and view.pool == "all")
        for view in views
    )


def text_views(text: str) -> str:
    """Checks a list of views and returns it; an empty text means that other flags define the views."""
    try:
        if text.strip():
            parse_views(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.strip()


def _has_paths(args: argparse.Namespace) -> bool:
    """Whether the training data are tables of image paths, rather than tables that contain the images."""
    if not names_tables(args.train_data):
        return False
    from training.data.embedded import embedded_sources  # imports pyarrow, which would slow down --help

    try:
        return not embedded_sources(args.train_data, args.csv_img_key)
    except (ValueError, OSError):
        return False  # reported when the data are opened


def add_data_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of training data flags; with `everything`, also flags that are rarely needed."""
    group = parser.add_argument_group("training data")
    _add_common_data_args(group)
    if everything:
        _add_more_data_args(group)
        _add_augmentation_args(parser.add_argument_group("augmentation and image features"))
    group = parser.add_argument_group("captions of a training sample")
    _add_common_caption_args(group)
    if everything:
        _add_more_caption_args(group)


def _add_common_data_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train-data",
        metavar="DATA",
        help="train on this: tar shards ('data/{00000..00575}.tar', a folder, URLs; several sources are separated by "
        "::), tables (.csv, .tsv, .json, .jsonl, .parquet, .arrow), folders of these or of images with NAME.txt, "
        "or hf:ORG/NAME:SPLIT",
    )
    group.add_argument(
        "--val-data", metavar="DATA", help="data for loss and R@1 during training, in any format of --train-data"
    )
    group.add_argument(
        "--train-num-samples", type=positive, metavar="N", help="samples per epoch (default: all of --train-data)"
    )
    group.add_argument(
        "--csv-img-key",
        "--image-key",
        default="filepath",
        metavar="COL",
        help="image column of a table: paths or images (default: %(default)s, else the only column of images, or the "
        "only one of file_name, image, image_path, ..)",
    )


def _add_more_data_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--csv-separator",
        metavar="C",
        help="column separator of .csv and .tsv tables (default: comma, semicolon or tab, whichever the first line has "
        "most of; for .tsv tab)",
    )
    group.add_argument(
        "--train-sizes",
        metavar="FILE",
        help='number of samples of each shard of --train-data, a file or URL: {"00000.tar": 10000, ..} (default: '
        "sizes.json beside the shards; else their headers are counted, which a pipe: does not allow)",
    )
    group.add_argument(
        "--index-cache",
        default=INDEX_CACHE,
        metavar="DIR",
        help="folder that keeps where samples begin in shards at URLs (default: ~/.cache/lotlip/shards)",
    )
    group.add_argument(
        "--dataset-resampled",
        action=Switch,
        help="draw shards with replacement instead of once per epoch; needs --train-num-samples",
    )
    group.add_argument(
        "--train-data-upsampling-factors",
        metavar="F::F",
        help="with --dataset-resampled: how often to draw from each source of --train-data, relative to the others",
    )
    group.add_argument(
        "--shuffle-window",
        type=positive,
        default=SHUFFLE_WINDOW,
        metavar="N",
        help="number of samples that a loader process holds and shuffles, from shards (default: %(default)s)",
    )
    group.add_argument(
        "--shuffle-shards",
        type=positive,
        default=SHUFFLE_SHARDS,
        metavar="N",
        help="number of shards that a loader process reads at the same time (default: %(default)s)",
    )


def _add_augmentation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--strong-augment",
        action=Switch,
        help="augment images with crop 0.2-1, colour jitter, grayscale, blur, flip and two random operations "
        "(default: open_clip's crop 0.9-1)",
    )
    group.add_argument(
        "--aug-cfg",
        nargs="*",
        default=[],
        metavar="K=V",
        help="settings of open_clip's augmentation, such as scale=0.4,1.0; none: the preprocessing of evaluation",
    )
    group.add_argument(
        "--extract-image-features",
        metavar="DIR",
        help="do not train: write the image tower's features of --train-data to DIR, which --train-data then accepts",
    )
    group.add_argument(
        "--feature-views",
        type=not_negative,
        default=0,
        metavar="V",
        help="with --extract-image-features: number of augmented views of each image; 0: one view with the "
        "preprocessing of evaluation (default: %(default)s)",
    )


def _add_common_caption_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text-views",
        type=text_views,
        default="",
        metavar="LIST",
        help="texts of a sample per step, such as 'raw, long*3' (LoTLIP) or 'sentences(1..3)*8' (FLAIR); see "
        "docs/training.md (default: set by --captions, --num-long-captions and --sub-caption-sentences)",
    )
    group.add_argument(
        "--num-long-captions",
        type=not_negative,
        default=3,
        metavar="K",
        help="number of long captions of a sample per step (default: %(default)s)",
    )
    group.add_argument(
        "--raw-caption-keys",
        type=names,
        default=",".join(RAW_KEYS),
        metavar="K,K",
        help="columns or JSON keys of the short caption; the first that a sample has is used (default: %(default)s)",
    )
    group.add_argument(
        "--long-caption-keys",
        type=names,
        default=",".join(LONG_KEYS),
        metavar="K,K",
        help="columns or JSON keys of long captions; all that a sample has are used (default: %(default)s)",
    )


def _add_more_caption_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--captions",
        default="both",
        choices=("both", "raw", "long"),
        help="both: the short caption and K long ones; raw: only the short one; long: K long ones, the first of which "
        "replaces the short one (default: %(default)s)",
    )
    group.add_argument(
        "--sub-caption-sentences",
        type=not_negative,
        default=0,
        metavar="N",
        help="use N consecutive sentences of each long caption; 0 uses all (default: %(default)s)",
    )
    group.add_argument(
        "--short-caption-keys",
        type=names,
        default="",
        metavar="K,K",
        help="additional short captions; each step draws one of these or the raw caption",
    )
    group.add_argument(
        "--caption-lists",
        default="alternatives",
        choices=("alternatives", "sentences"),
        help="alternatives: each text of a list is a caption of its own; sentences: a list is one caption (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--caption-lines",
        "--retrieval-caption-lines",
        action=Switch,
        help="each line of a .txt is a caption of its own",
    )


def validate_data_args(args: argparse.Namespace) -> None:
    """Checks the flags of this file; called in training only.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    if args.feature_views and not args.extract_image_features:
        raise ValueError("--feature-views needs --extract-image-features")
    if args.extract_image_features and (args.dataset_resampled or args.resume):
        raise ValueError(
            "--extract-image-features reads every sample once and resumes by itself: omit --dataset-resampled and "
            "--resume"
        )
    if args.train_data_upsampling_factors and not args.dataset_resampled:
        raise ValueError("--train-data-upsampling-factors needs --dataset-resampled: otherwise each sample comes once")
    if args.dataset_resampled and not args.train_num_samples:
        raise ValueError("--dataset-resampled needs --train-num-samples: drawing with replacement has no end")
    if args.captions == "long" and not args.num_long_captions:
        raise ValueError("--captions long needs --num-long-captions of at least 1")
    if args.strong_augment and args.aug_cfg:
        raise ValueError("--strong-augment and --aug-cfg exclude each other")
    for word in args.aug_cfg:
        if "=" not in word and args.aug_cfg != ["none"]:
            raise ValueError(f"--aug-cfg {word}: expected KEY=VALUE, or only none")
