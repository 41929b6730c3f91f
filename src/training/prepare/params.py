"""Flags of `python -m training.prepare`. This module imports nothing heavy, so that --help is fast."""

import argparse
import os

from training.flags.types import json_object, names, not_negative, positive, positive_numbers
from training.runtime.progress import add_timeout_arg

DESCRIPTION = """\
From caption tables and images to training shards. See TRAIN_DATASETS.md.

  python -m training.prepare tables cc3m_3long_3short_1raw_captions_url.csv --out data/cc3m-tables
  python -m training.prepare download data/cc3m-tables --out data/cc3m
  python -m training.prepare inspect data/cc3m --out data/cc3m-report
  python -m training.prepare join data/cc3m-tables --shards data/own --out data/own-captioned
  python -m training.prepare recaption data/own --out data/own-captioned --caption long_caption=detailed --vlm FOLDER

If a command was killed, run it again: it continues, and does not repeat what is complete on disk.
"""
_TABLES = ".csv, .tsv, .json, .jsonl, .parquet or .arrow tables, folders of them, or hf:ORG/NAME"
_SHARDS = "as --train-data: a folder, 'data/{0..9}.tar', URLs, A::B"
_SHARDS_TO_WRITE = f"{_SHARDS}; also a folder of folders of images, as img2dataset leaves it"


class _WithDefaults(argparse.HelpFormatter):
    """Adds the default of a flag to its help, unless that says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.option_strings and action.nargs != 0 and action.default not in (None, [])
        return f"{action.help} (default: %(default)s)" if has_default and "default" not in action.help else action.help


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
    for name, (about, module, add_args) in COMMANDS.items():
        command = commands.add_parser(
            name, help=about, description=about, formatter_class=_WithDefaults, allow_abbrev=False
        )
        command.set_defaults(module=module)
        add_args(command)
        add_timeout_arg(command, 120.0)  # a shard of downloads may take long
    return parser


def _add_workers_arg(parser: argparse.ArgumentParser, most: int = 64) -> None:
    text = f"processes (default: one per CPU core, at most {most})"
    parser.add_argument("--workers", type=positive, default=min(most, os.cpu_count() or 1), metavar="N", help=text)


def _add_reading_args(parser: argparse.ArgumentParser) -> None:
    text = "separator of .csv and .tsv tables (default: comma, semicolon or tab, by the first line; for .tsv tab)"
    parser.add_argument("--csv-separator", "--separator", metavar="C", help=text)


def _add_image_column_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv-img-key", default="filepath", metavar="COL", help="image column of a table")


def _add_lists_arg(parser: argparse.ArgumentParser, of_alternatives: str = "") -> None:
    lists = ("alternatives", "sentences")
    text = f"sentences: a list of texts is one caption; alternatives: it is several{of_alternatives}"
    parser.add_argument("--caption-lists", default="alternatives", choices=lists, help=text)


def _add_output_args(parser: argparse.ArgumentParser, content: str) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help=f"new folder for {content}")
    parser.add_argument("--summary", metavar="FILE", help="write the counts to this file, as JSON")


def _add_tables_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="+", metavar="IN", help=_TABLES)
    _add_output_args(parser, "part-*.parquet and _summary.json")
    add("--url-column", metavar="COL", help="column of image URLs (default: Image Path, url, URL, image_url)")
    add("--key-column", metavar="COL", help="column of keys (default: key; else keys are made from URLs)")
    text = "column of raw captions (default: raw_caption, org_caption, caption, TEXT)"
    add("--raw-caption-keys", "--raw-column", dest="raw_column", metavar="COL", help=text)
    text = "columns of %s captions, and names to write them under (default: the published names%s)"
    for kind, further in (("long", ", vlm_caption, re_caption"), ("short", "")):
        flags = f"--{kind}-caption-keys", f"--{kind}-columns"
        add(*flags, dest=f"{kind}_columns", type=names, metavar="COL[=NAME],..", help=text % (kind, further))
    _add_reading_args(parser)
    add("--no-quotes", action="store_true", help="read quotes as plain characters, as many .tsv files need it")
    _add_lists_arg(parser, ", which a part can't hold")
    add("--keep-cut-off", action="store_true", help="do not remove unfinished last sentences of long captions")
    add("--keep-without-long", action="store_true", help="keep rows that have only a raw or short caption")
    add("--rows-per-part", type=positive, default=20_000, metavar="N", help="rows that a process has in memory")
    _add_workers_arg(parser, most=8)


def _add_shards_out_args(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="folder for the new shards, under their old names, and sizes.json")
    where.add_argument("--in-place", action="store_true", help="replace each shard when its new file is complete")
    parser.add_argument("--summary", metavar="FILE", help="write the counts to this file, as JSON")
    _add_range_arg(parser, "; the jobs of a SLURM array and the processes of srun divide them without this")


def _add_range_arg(parser: argparse.ArgumentParser, note: str = "") -> None:
    parser.add_argument("--shard-range", metavar="A:B", help=f"only shards number A to B - 1{note}")


def _add_join_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", nargs="+", metavar="IN", help=_TABLES)
    add("--shards", required=True, metavar="SHARDS", help=_SHARDS_TO_WRITE)
    _add_shards_out_args(parser)
    text = (
        "url: match the url in table and JSON; key: match the table's key with the sample's name or the JSON's key, "
        "with or without folder and suffix (default: url if the first samples have one)"
    )
    add("--match", choices=("url", "key"), help=text)
    add("--key-column", metavar="COL", help="the table's column of keys or image names (default: key)")
    add("--columns", type=names, metavar="COL,..", help="captions to add (default: all columns of text)")
    _add_lists_arg(parser, ", and stays a list")
    add("--keep-existing", action="store_true", help="never overwrite captions that samples have")
    _add_workers_arg(parser)


def _add_inspect_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="DATA", help=f"shards or tables, {_SHARDS}")
    add("--out", required=True, metavar="DIR", help="folder for inspect.json and samples.html")
    add("--model", default="lotlip_bert-ViT-B-16", metavar="NAME", help="model whose tokenizer counts tokens")
    add("--cache-dir", metavar="DIR", help="folder of the model's files, as in training.main")
    text = "report the fraction of captions longer than each (default: %(default)s, and the model's own)"
    add("--context-lengths", type=positive_numbers, default="77,128,248,512", metavar="N,N", help=text)
    text = "caption keys (default: known keys, and those that end in caption or captions)"
    add("--caption-keys", type=names, metavar="K,K", help=text)
    _add_lists_arg(parser)
    _add_image_column_arg(parser)
    _add_reading_args(parser)
    add("--show", type=not_negative, default=50, metavar="N", help="samples on the page")
    add("--seed", type=int, default=0, metavar="S", help="seed of the choice of samples")
    add("--read-images", action="store_true", help="decode every image instead of only its header")
    _add_range_arg(parser)
    _add_workers_arg(parser)


def _add_download_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tables", metavar="IN", help="a Parquet table, or a folder of them, as `tables` writes them")
    _add_output_args(parser, "the shards and sizes.json")
    add("--image-size", type=positive, default=256, metavar="N", help="pixels")
    text = "img2dataset's resize mode; keep_ratio: reduce the shorter side to --image-size, leave smaller images"
    modes = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
    add("--resize-mode", default="keep_ratio", choices=modes, help=text)
    add("--samples-per-shard", type=positive, default=10_000, metavar="N", help="rows per shard")
    add("--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="default: one per CPU core")
    add("--threads", type=positive, default=64, metavar="N", help="threads per process")
    add("--timeout", type=positive, default=10, metavar="S", help="seconds to wait for an image")
    add("--retries", type=not_negative, default=1, metavar="N", help="retries per image")
    distributors = ("multiprocessing", "pyspark", "ray")
    add("--distributor", default="multiprocessing", choices=distributors, help="one machine, or a cluster")
    add("--img2dataset", default="img2dataset", metavar="COMMAND", help="img2dataset's command")
    add("--engine-flag", action="append", default=[], metavar="=--K=V", help="a further flag of it; may be repeated")
    add("--print-command", action="store_true", help="print img2dataset's command line, and stop")
    add("--check-only", action="store_true", help="fetch nothing; only check the shards and write sizes.json")


def _add_split_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", metavar="TABLE", help="a table of images and captions, as --train-data reads them")
    add("--out", required=True, metavar="DIR", help="new folder for train.parquet and test.parquet")
    add("--test", type=float, default=0.1, metavar="X", help="fraction of the images")
    add("--seed", type=int, default=0, metavar="S", help="seed of the choice")
    _add_image_column_arg(parser)
    _add_reading_args(parser)


def _add_recaption_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", help=_SHARDS_TO_WRITE)
    _add_shards_out_args(parser)
    add("--vlm", required=True, metavar="NAME", help="the model: a folder, or a name on the hub")
    text = "write answers under KEY; PROMPT is detailed, short, visible, or any text; may be repeated"
    add("--caption", action="append", required=True, metavar="KEY=PROMPT", help=text)
    engines = ("auto", "vllm", "transformers")
    add("--engine", default="auto", choices=engines, help="auto (default): vLLM if it is installed")
    add("--max-tokens", type=positive, default=256, metavar="N", help="maximum number of tokens per caption")
    add("--batch-size", type=positive, metavar="N", help="images per batch (default: 512 with vLLM, else 32)")
    text = """further arguments of vllm.LLM, e.g. '{"max_model_len": 4096, "gpu_memory_utilization": 0.8}'"""
    add("--vllm-args", type=json_object, metavar="JSON", help=text)
    add("--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that share one model, with vLLM")
    add("--device", metavar="DEV", help="for example cpu or cuda:1 (default: a GPU, else cpu)")
    add("--cache-dir", metavar="DIR", help="folder for downloads from the hub")


# Command -> (what it does, its module, function that adds its flags).
COMMANDS = {
    "tables": ("clean published caption tables into Parquet parts", "tables.run", _add_tables_args),
    "download": ("fetch the images of such parts into shards, with img2dataset", "download", _add_download_args),
    "join": ("add captions from tables to existing shards", "shards.join", _add_join_args),
    "split": ("divide images into train and test, near-duplicates on one side", "split", _add_split_args),
    "inspect": ("statistics of shards or tables, and samples to look at", "inspect.run", _add_inspect_args),
    "recaption": ("write long captions for images with a vision-language model", "recaption", _add_recaption_args),
}
