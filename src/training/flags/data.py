"""Flags of training data: sources of samples, augmentation of images, selection of captions."""

import argparse
from collections.abc import Iterable

from training.data.captions import LONG_KEYS, RAW_KEYS
from training.data.order import SHUFFLE_SHARDS, SHUFFLE_WINDOW
from training.data.views import Entry, parse_views, views_by_flags
from training.flags.effects import ALWAYS, DATA, TRAINING, TRAINING_MEANT, Condition
from training.flags.types import Flags, character, names
from training.readers.samples import INDEX_CACHE
from training.readers.table_files import names_csv, names_tables

_TABLE = Condition(
    "without a table (.csv, .tsv, .json, .jsonl, .parquet or .arrow)",
    lambda args: any(map(names_tables, (args.train_data, args.val_data, args.retrieval_table))),
)
_CSV = Condition(
    "without a .csv or .tsv table",
    lambda args: any(map(names_csv, (args.train_data, args.val_data, args.retrieval_table))),
    refused=True,
)
_SHARDS = Condition("for a table of image paths, whose rows are all shuffled", lambda args: not _has_paths(args))
LONG = Condition(
    "without a text from long captions; see --text-views", lambda args: reads(caption_entries(args), "long")
)
_SHORT = Condition(
    "without a text from short captions; see --text-views", lambda args: reads(caption_entries(args), "short")
)
_OWN_DATA = Condition(
    "without --train-data, --val-data, --retrieval-table or --retrieval-wds",
    lambda args: DATA.holds(args) or args.retrieval_table or args.retrieval_wds,
)
_BY_FLAGS = Condition("with --text-views; omit one or the other", lambda args: not args.text_views, refused=True)

EFFECTS = (
    (ALWAYS, "--val-data"),
    (TRAINING_MEANT, "--extract-image-features"),
    (_TABLE, "--csv-img-key"),
    (_CSV, "--csv-separator"),
    (TRAINING, "--train-data --train-num-samples --dataset-resampled --train-data-upsampling-factors"),
    (TRAINING, "--train-sizes --shuffle-window --shuffle-shards --feature-views --strong-augment --aug-cfg"),
    (DATA, "--index-cache --num-long-captions --captions --sub-caption-sentences --text-views"),
    (DATA, "--raw-caption-keys --short-caption-keys --long-caption-keys"),
    (_SHARDS, "--shuffle-window --shuffle-shards --train-sizes --index-cache"),
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
    from training.data.tables import embedded_sources  # imports pyarrow, which would slow down --help

    try:
        return not embedded_sources(args.train_data, args.csv_img_key)
    except (ValueError, OSError):
        return False  # reported when the data are opened


def add_data_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of training data flags; with `everything`, also flags that are rarely needed."""
    group = Flags(parser, "training data")
    _add_common_data_args(group)
    if everything:
        _add_more_data_args(group)
        _add_augmentation_args(Flags(parser, "augmentation and image features"))
    group = Flags(parser, "captions of a training sample")
    _add_common_caption_args(group)
    if everything:
        _add_more_caption_args(group)


def _add_common_data_args(group: Flags) -> None:
    group.text(
        "--train-data",
        "DATA",
        "train on this: tar shards ('data/{00000..00575}.tar', a folder, URLs; several sources are separated by ::), "
        "tables (.csv, .tsv, .json, .jsonl, .parquet, .arrow), folders of these or of images with NAME.txt, or "
        "hf:ORG/NAME:SPLIT; or synthetic[:TOKENS], made on the spot",
    )
    group.text(
        "--val-data",
        "DATA",
        "data for loss and R@1 during training, or of --pretrained without --train-data; in any format of --train-data",
    )
    group.count("--train-num-samples", None, "samples per epoch (default: all of --train-data)")
    group.text(
        "--csv-img-key --image-key",
        "COL",
        "image column of a table: paths or images (default: %(default)s, else the only column of images, or the only "
        "one of file_name, image, image_path, ..)",
        default="filepath",
    )


def _add_more_data_args(group: Flags) -> None:
    group.text(
        "--csv-separator",
        "C",
        "column separator of .csv and .tsv tables (default: comma, semicolon or tab, whichever the first line has "
        "most of; for .tsv tab)",
        type=character,
    )
    group.text(
        "--train-sizes",
        "FILE",
        'number of samples of each shard of --train-data, a file or URL: {"00000.tar": 10000, ..} (default: '
        "sizes.json beside the shards; else their headers are counted, which a pipe: does not allow)",
    )
    group.text(
        "--index-cache",
        "DIR",
        "folder that keeps where samples begin in shards at URLs (default: ~/.cache/lotlip/shards)",
        default=INDEX_CACHE,
    )
    group.switch(
        "--dataset-resampled", "draw shards with replacement instead of once per epoch; needs --train-num-samples"
    )
    group.text(
        "--train-data-upsampling-factors",
        "F::F",
        "with --dataset-resampled: how often to draw from each source of --train-data, relative to the others",
    )
    group.count(
        "--shuffle-window", SHUFFLE_WINDOW, "number of samples that a loader process holds and shuffles, from shards"
    )
    group.count("--shuffle-shards", SHUFFLE_SHARDS, "number of shards that a loader process reads at the same time")


def _add_augmentation_args(group: Flags) -> None:
    group.switch(
        "--strong-augment",
        "augment images with crop 0.2-1, colour jitter, grayscale, blur, flip and two random operations (default: "
        "open_clip's crop 0.9-1)",
    )
    group.add_argument(
        "--aug-cfg",
        nargs="*",
        default=[],
        metavar="K=V",
        help="settings of open_clip's augmentation, such as scale=0.4,1.0; none: the preprocessing of evaluation",
    )
    group.text(
        "--extract-image-features",
        "DIR",
        "do not train: write the image tower's features of --train-data to DIR, which --train-data then accepts",
    )
    group.whole(
        "--feature-views",
        0,
        "with --extract-image-features: number of augmented views of each image; 0: one view with the preprocessing "
        "of evaluation (default: %(default)s)",
        metavar="V",
    )


def _add_common_caption_args(group: Flags) -> None:
    group.text(
        "--text-views",
        "LIST",
        "texts of a sample per step, such as 'raw, long*3' (LoTLIP) or 'sentences(1..3)*8' (FLAIR); see "
        "docs/training.md (default: set by --captions, --num-long-captions and --sub-caption-sentences)",
        default="",
        type=text_views,
    )
    group.whole("--num-long-captions", 3, "number of long captions of a sample per step", metavar="K")
    group.text(
        "--raw-caption-keys",
        "K,K",
        "columns or JSON keys of the short caption; the first that a sample has is used",
        default=",".join(RAW_KEYS),
        type=names,
    )
    group.text(
        "--long-caption-keys",
        "K,K",
        "columns or JSON keys of long captions; all that a sample has are used",
        default=",".join(LONG_KEYS),
        type=names,
    )


def _add_more_caption_args(group: Flags) -> None:
    group.choice(
        "--captions",
        ("both", "raw", "long"),
        "both",
        "both: the short caption and K long ones; raw: only the short one; long: K long ones, the first of which "
        "replaces the short one (default: %(default)s)",
    )
    group.whole("--sub-caption-sentences", 0, "use N consecutive sentences of each long caption; 0 uses all")
    group.text(
        "--short-caption-keys",
        "K,K",
        "additional short captions; each step draws one of these or the raw caption",
        default="",
        type=names,
    )
    group.choice(
        "--caption-lists",
        ("alternatives", "sentences"),
        "alternatives",
        "alternatives: each text of a list is a caption of its own; sentences: a list is one caption (default: "
        "%(default)s)",
    )
    group.switch("--caption-lines --retrieval-caption-lines", "each line of a .txt is a caption of its own")


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
