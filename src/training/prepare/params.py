"""Flags of `python -m training.prepare`. Imports nothing heavy, so that --help answers at once."""

import argparse
import os

from training.flags.types import json_object, names, not_negative, positive, positive_numbers

COMMANDS = {
    "tables": "clean published caption tables into Parquet parts",
    "download": "fetch the images of such parts into shards, with img2dataset",
    "join": "add captions of tables to shards that are there",
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

A command that was killed goes on when it is run again. What is whole on disk is not made again.
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
    add |= {"recaption": add_recaption_args}
    for name, add_args in add.items():
        add_args(commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], allow_abbrev=False))
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
    """Flags of `tables`."""
    parser.add_argument("tables", nargs="+", metavar="IN", help=".csv, .tsv or .parquet tables, or folders of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for part-*.parquet and summary.json")
    parser.add_argument("--summary", metavar="FILE", help="a further place for the summary")
    parser.add_argument("--url-column", metavar="COL", help="image URLs (default: Image Path, url, URL, image_url)")
    parser.add_argument(
        "--key-column", metavar="COL", help="keys (default: key; made from the URL where there is none)"
    )
    parser.add_argument(
        "--raw-column", metavar="COL", help="raw captions (default: raw_caption, org_caption, caption, TEXT)"
    )
    parser.add_argument(
        "--long-columns",
        type=names,
        metavar="COL[=NAME],..",
        help="long captions, and names to write them under (default: the published names, vlm_caption, re_caption)",
    )
    parser.add_argument(
        "--short-columns", type=names, metavar="COL[=NAME],..", help="the same of short ones (default: published names)"
    )
    parser.add_argument("--separator", metavar="C", help="of .csv and .tsv tables (default: a comma; a tab in .tsv)")
    parser.add_argument("--no-quotes", action="store_true", help="quotes are plain characters, as in many .tsv")
    parser.add_argument(
        "--keep-cut-off", action="store_true", help="leave unfinished last sentences of long captions where they are"
    )
    parser.add_argument(
        "--keep-without-long", action="store_true", help="keep rows that have a raw or short caption only"
    )
    parser.add_argument(
        "--rows-per-part", type=positive, default=100_000, metavar="N", help="rows of a chunk (default: %(default)s)"
    )
    _workers(parser, most=8)  # together under 2 GB


def _output(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="folder for the new shards, under their old names, and sizes.json")
    where.add_argument(
        "--in-place", action="store_true", help="write over the shards; each is replaced when it is whole"
    )
    parser.add_argument("--summary", metavar="FILE", help="write the counts as JSON")
    parser.add_argument(
        "--shard-range",
        metavar="A:B",
        help="only the shards number A to B - 1 (jobs of a SLURM array and processes of srun share all by themselves)",
    )


def add_join_args(parser: argparse.ArgumentParser) -> None:
    """Flags of `join`."""
    parser.add_argument(
        "tables", nargs="+", metavar="IN", help="Parquet tables, or folders of them, as `tables` writes"
    )
    parser.add_argument(
        "--shards", required=True, metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar'"
    )
    _output(parser)
    parser.add_argument(
        "--match",
        choices=("url", "key"),
        help="url: the same in table and JSON; key: the table's is the sample's name or the JSON's key "
        "(default: url if the first samples have one)",
    )
    parser.add_argument(
        "--columns", type=names, metavar="COL,..", help="captions to add (default: all columns of text)"
    )
    parser.add_argument("--keep-existing", action="store_true", help="leave captions that samples have as they are")
    parser.add_argument(
        "--samples-per-pass",
        type=positive,
        default=300_000,
        metavar="N",
        help="samples whose captions are held in memory, about 3 KB each (default: %(default)s)",
    )
    _workers(parser)


def add_inspect_args(parser: argparse.ArgumentParser) -> None:
    """Flags of `inspect`."""
    parser.add_argument("shards", metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar', URLs, A::B")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for inspect.json, inspect.png, samples.html"
    )
    parser.add_argument(
        "--model", default="lotlip_bert-ViT-B-16", metavar="NAME", help="whose tokenizer counts (default: %(default)s)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="where its files are, as in training.main")
    parser.add_argument(
        "--context-lengths",
        type=positive_numbers,
        default="77,128,248,512",
        metavar="N,N",
        help="tell the share of captions that are longer (default: %(default)s, and the model's own)",
    )
    parser.add_argument(
        "--caption-keys",
        type=names,
        metavar="K,K",
        help="what to count (default: known keys, and ..caption, ..captions)",
    )
    parser.add_argument("--show", type=not_negative, default=50, metavar="N", help="samples on the page (default: 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of their choice (default: %(default)s)")
    parser.add_argument("--read-images", action="store_true", help="decode every image, not its header alone")
    parser.add_argument("--shard-range", metavar="A:B", help="only the shards number A to B - 1")
    _workers(parser)


def add_download_args(parser: argparse.ArgumentParser) -> None:
    """Flags of `download`."""
    parser.add_argument("tables", metavar="IN", help="a Parquet table, or a folder of them, as `tables` writes")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards and sizes.json")
    parser.add_argument("--summary", metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--image-size", type=positive, default=256, metavar="N", help="pixels (default: %(default)s)")
    parser.add_argument(
        "--resize-mode",
        default="keep_ratio",
        choices=("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"),
        help="img2dataset's; keep_ratio: the shorter side gets --image-size, smaller images stay (default: keep_ratio)",
    )
    parser.add_argument(
        "--samples-per-shard", type=positive, default=10_000, metavar="N", help="rows of a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="default: one per CPU core"
    )
    parser.add_argument("--threads", type=positive, default=64, metavar="N", help="a process (default: %(default)s)")
    parser.add_argument("--timeout", type=positive, default=10, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument(
        "--retries", type=not_negative, default=1, metavar="N", help="of an image (default: %(default)s)"
    )
    parser.add_argument(
        "--distributor",
        default="multiprocessing",
        choices=("multiprocessing", "pyspark", "ray"),
        help="one machine, or a cluster of yours (default: %(default)s)",
    )
    parser.add_argument(
        "--img2dataset", default="img2dataset", metavar="COMMAND", help="its command (default: %(default)s)"
    )
    parser.add_argument(
        "--engine-flag", action="append", default=[], metavar="=--K=V", help="one more flag for it; may be repeated"
    )
    parser.add_argument("--print-command", action="store_true", help="say how it would be called, and stop")
    parser.add_argument(
        "--check-only", action="store_true", help="fetch nothing: compare what is there, write sizes.json"
    )


def add_recaption_args(parser: argparse.ArgumentParser) -> None:
    """Flags of `recaption`."""
    parser.add_argument("shards", metavar="SHARDS", help="as --train-data: a folder, 'data/{0..9}.tar'")
    _output(parser)
    parser.add_argument("--vlm", required=True, metavar="NAME", help="the model: a folder or a name of the hub")
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
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="of a caption (default: 256)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images (default: 512 with vLLM, else 32)")
    parser.add_argument(
        "--vllm-args",
        type=json_object,
        metavar="JSON",
        help='more arguments of vllm.LLM, e.g. \'{"max_model_len": 4096, "gpu_memory_utilization": 0.8}\'',
    )
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share one model, with vLLM"
    )
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda:1, .. (default: a GPU of this process, else cpu)")
    parser.add_argument("--cache-dir", metavar="DIR", help="where downloads from the hub are kept")
