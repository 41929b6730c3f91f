"""Flags of `python -m training.prepare`. This module imports nothing heavy, so that --help is fast."""

import argparse
import os

from training.flags.types import json_object, names, not_negative, positive, positive_numbers
from training.runtime.progress import add_timeout_arg

COMMANDS = {
    "tables": "clean published caption tables into Parquet parts",
    "download": "fetch the images of such parts into shards, with img2dataset",
    "join": "add captions from tables to existing shards",
    "split": "divide a table of images into a train and a test part, near-duplicates on one side",
    "inspect": "statistics of a shard set, and a page of samples to look at",
    "recaption": "write long captions for images in shards with a vision-language model",
}
DESCRIPTION = """\
From caption tables and images to training shards. See TRAIN_DATASETS.md.

  python -m training.prepare tables cc3m_3long_3short_1raw_captions_url.csv --out data/cc3m-tables
  python -m training.prepare download data/cc3m-tables --out data/cc3m
  python -m training.prepare inspect data/cc3m --out data/cc3m-report
  python -m training.prepare join data/cc3m-tables --shards data/own --out data/own-captioned
  python -m training.prepare recaption data/own --out data/own-captioned --caption long_caption=detailed --vlm FOLDER

If a command was killed, run it again: it continues, and does not repeat what is complete on disk.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with its commands."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Exit codes: 0 done, 1 failed on some data, 2 usage error, 130 Ctrl-C.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {"tables": add_tables_args, "download": add_download_args, "join": add_join_args, "inspect": add_inspect_args}
    add |= {"recaption": add_recaption_args, "split": add_split_args}
    for name, add_args in add.items():
        command = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], allow_abbrev=False)
        add_args(command)
        add_timeout_arg(command, 120.0)  # a shard of downloads may take long
    return parser


def _workers(parser: argparse.ArgumentParser, most: int = 64) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        default=min(most, os.cpu_count() or 1),
        metavar="N",
        help=f"processes (default: as many as there are CPU cores, at most {most})",
    )


def add_tables_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `tables`."""
    parser.add_argument(
        "tables",
        nargs="+",
        metavar="IN",
        help=".csv, .tsv, .json, .jsonl, .parquet or .arrow tables, folders of them, or hf:ORG/NAME",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for part-*.parquet and _summary.json")
    parser.add_argument("--summary", metavar="FILE", help="write the summary to this file as well")
    _add_column_args(parser)
    parser.add_argument(
        "--keep-cut-off", action="store_true", help="do not remove unfinished last sentences of long captions"
    )
    parser.add_argument(
        "--keep-without-long", action="store_true", help="keep rows that have only a raw or short caption"
    )
    parser.add_argument(
        "--rows-per-part", type=positive, default=100_000, metavar="N", help="rows per chunk (default: %(default)s)"
    )
    _workers(parser, most=8)  # they use less than 2 GB together


def _add_column_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url-column", metavar="COL", help="column of image URLs (default: Image Path, url, URL, image_url)"
    )
    parser.add_argument(
        "--key-column", metavar="COL", help="column of keys (default: key; without one, keys are made from URLs)"
    )
    parser.add_argument(
        "--raw-caption-keys",
        "--raw-column",
        dest="raw_column",
        metavar="COL",
        help="column of raw captions (default: raw_caption, org_caption, caption, TEXT)",
    )
    parser.add_argument(
        "--long-caption-keys",
        "--long-columns",
        dest="long_columns",
        type=names,
        metavar="COL[=NAME],..",
        help="columns of long captions, and names to write them under (default: the published names, vlm_caption, "
        "re_caption)",
    )
    parser.add_argument(
        "--short-caption-keys",
        "--short-columns",
        dest="short_columns",
        type=names,
        metavar="COL[=NAME],..",
        help="columns of short captions, likewise (default: the published names)",
    )
    parser.add_argument(
        "--csv-separator",
        "--separator",
        metavar="C",
        help="separator of .csv and .tsv tables (default: comma, semicolon or tab, whichever the first line has most "
        "of; for .tsv tab)",
    )
    parser.add_argument(
        "--caption-lists",
        default="alternatives",
        choices=("alternatives", "sentences"),
        help="sentences: a list of texts is one caption; alternatives: it is several, which a part can't hold "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-quotes", action="store_true", help="read quotes as plain characters, as many .tsv files need it"
    )


def _output(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="folder for the new shards, under their old names, and sizes.json")
    where.add_argument(
        "--in-place", action="store_true", help="overwrite the shards; each is replaced when its new file is complete"
    )
    parser.add_argument("--summary", metavar="FILE", help="write the counts as JSON")
    parser.add_argument(
        "--shard-range",
        metavar="A:B",
        help="only shards number A to B - 1 (the jobs of a SLURM array and the processes of srun divide the shards "
        "among themselves without this)",
    )


def add_join_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `join`."""
    parser.add_argument(
        "tables", nargs="+", metavar="IN", help="tables (.parquet, .csv, .tsv, .jsonl), or folders of them"
    )
    parser.add_argument(
        "--shards", required=True, metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar'"
    )
    _output(parser)
    parser.add_argument(
        "--match",
        choices=("url", "key"),
        help="url: match the url in table and JSON; key: match the table's key with the sample's name or the JSON's "
        "key, with or without folder and suffix (default: url if the first samples have one)",
    )
    parser.add_argument(
        "--key-column", metavar="COL", help="the table's column of keys or image names, with --match key (default: key)"
    )
    parser.add_argument(
        "--columns", type=names, metavar="COL,..", help="captions to add (default: all columns of text)"
    )
    parser.add_argument("--keep-existing", action="store_true", help="never overwrite captions that samples have")
    parser.add_argument(
        "--samples-per-pass",
        type=positive,
        default=300_000,
        metavar="N",
        help="number of samples whose captions are kept in memory, about 3 KB each (default: %(default)s)",
    )
    _workers(parser)


def add_inspect_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `inspect`."""
    parser.add_argument("shards", metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar', URLs, A::B")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for inspect.json, inspect.png, samples.html"
    )
    parser.add_argument(
        "--model",
        default="lotlip_bert-ViT-B-16",
        metavar="NAME",
        help="model whose tokenizer counts tokens (default: %(default)s)",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of the model's files, as in training.main")
    parser.add_argument(
        "--context-lengths",
        type=positive_numbers,
        default="77,128,248,512",
        metavar="N,N",
        help="report the fraction of captions longer than each (default: %(default)s, and the model's own)",
    )
    parser.add_argument(
        "--caption-keys",
        type=names,
        metavar="K,K",
        help="caption keys (default: known keys, and those that end in caption or captions)",
    )
    parser.add_argument("--show", type=not_negative, default=50, metavar="N", help="samples on the page (default: 50)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the choice of samples (default: %(default)s)"
    )
    parser.add_argument("--read-images", action="store_true", help="decode every image instead of only its header")
    parser.add_argument("--shard-range", metavar="A:B", help="only shards number A to B - 1")
    _workers(parser)


def add_download_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `download`."""
    parser.add_argument("tables", metavar="IN", help="a Parquet table, or a folder of them, as `tables` writes them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards and sizes.json")
    parser.add_argument("--summary", metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--image-size", type=positive, default=256, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument(
        "--resize-mode",
        default="keep_ratio",
        choices=("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"),
        help="img2dataset's resize mode; keep_ratio: reduce the shorter side to --image-size, leave smaller images as "
        "they are (default: keep_ratio)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=positive,
        default=10_000,
        metavar="N",
        help="rows per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="default: one per CPU core"
    )
    parser.add_argument(
        "--threads", type=positive, default=64, metavar="N", help="threads per process (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=10, metavar="S", help="seconds to wait for an image (default: %(default)s)"
    )
    parser.add_argument(
        "--retries", type=not_negative, default=1, metavar="N", help="retries per image (default: %(default)s)"
    )
    parser.add_argument(
        "--distributor",
        default="multiprocessing",
        choices=("multiprocessing", "pyspark", "ray"),
        help="run on one machine, or on a cluster with PySpark or Ray (default: %(default)s)",
    )
    parser.add_argument(
        "--img2dataset", default="img2dataset", metavar="COMMAND", help="img2dataset's command (default: %(default)s)"
    )
    parser.add_argument(
        "--engine-flag",
        action="append",
        default=[],
        metavar="=--K=V",
        help="a further flag for img2dataset; may be repeated",
    )
    parser.add_argument("--print-command", action="store_true", help="print img2dataset's command line, and stop")
    parser.add_argument(
        "--check-only", action="store_true", help="fetch nothing; only check the shards and write sizes.json"
    )


def add_split_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `split`."""
    parser.add_argument("table", metavar="TABLE", help="a table of images and captions, as --train-data reads them")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for train.parquet and test.parquet")
    parser.add_argument(
        "--test", type=float, default=0.1, metavar="X", help="share of the images (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the choice (default: %(default)s)")
    parser.add_argument("--csv-img-key", default="filepath", metavar="COL", help="image column (default: %(default)s)")
    parser.add_argument("--csv-separator", metavar="C", help="separator of a CSV (default: a comma; a tab in .tsv)")


def add_recaption_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `recaption`."""
    parser.add_argument("shards", metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar'")
    _output(parser)
    parser.add_argument("--vlm", required=True, metavar="NAME", help="the model: a folder, or a name on the hub")
    parser.add_argument(
        "--caption",
        action="append",
        required=True,
        metavar="KEY=PROMPT",
        help="write answers under KEY; PROMPT is detailed, short, visible, or any text; may be repeated",
    )
    parser.add_argument(
        "--engine", default="auto", choices=("auto", "vllm", "transformers"), help="auto: vLLM if it is installed"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="maximum number of tokens per caption (default: 256)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per batch (default: 512 with vLLM, else 32)"
    )
    parser.add_argument(
        "--vllm-args",
        type=json_object,
        metavar="JSON",
        help='further arguments of vllm.LLM, e.g. \'{"max_model_len": 4096, "gpu_memory_utilization": 0.8}\'',
    )
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share one model, with vLLM"
    )
    parser.add_argument("--device", metavar="DEV", help="for example cpu or cuda:1 (default: a GPU, else cpu)")
    parser.add_argument("--cache-dir", metavar="DIR", help="folder for downloads from the hub")
