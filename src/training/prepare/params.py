"""From caption tables and images to training shards. See TRAIN_DATASETS.md.

  python -m training.prepare tables cc3m_3long_3short_1raw_captions_url.csv --out data/cc3m-tables
  python -m training.prepare download data/cc3m-tables --out data/cc3m
  python -m training.prepare inspect data/cc3m --out data/cc3m-report
  python -m training.prepare join data/cc3m-tables --shards data/own --out data/own-captioned
  python -m training.prepare recaption data/own --out data/own-captioned --caption long_caption=detailed --vlm FOLDER

If a command was killed, run it again: it continues, and does not repeat what is complete on disk.
"""

# This module imports nothing heavy, so that --help is fast.
import argparse
import os

from training.flags.types import Flags, HelpFormatter, character, json_object, names, positive_numbers
from training.readers.captions import CAPTION_LISTS
from training.runtime.processes import add_timeout_arg

_TABLES = ".csv, .tsv, .json, .jsonl, .parquet or .arrow tables, folders of them, or hf:ORG/NAME"
_SHARDS = "as --train-data: a folder, 'data/{0..9}.tar', URLs, A::B"
_SHARDS_TO_WRITE = f"{_SHARDS}; also a folder of folders of images, as img2dataset leaves it"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with its commands."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Exit codes: 0 done, 1 failed on some data, 2 usage error, 130 Ctrl-C.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, module, add_flags) in COMMANDS.items():
        command = commands.add_parser(name, help=about, formatter_class=HelpFormatter, allow_abbrev=False)
        command.description = about
        command.set_defaults(module=module)
        add_flags(Flags(command, "flags"))
        add_timeout_arg(command, 120.0)  # a shard of downloads may take long
    return parser


def _add_workers(flags: Flags, most: int = 64) -> None:
    flags.count("--workers", min(most, os.cpu_count() or 1), f"processes (default: one per CPU core, at most {most})")


def _add_separator(flags: Flags) -> None:
    text = "separator of .csv and .tsv tables (default: comma, semicolon or tab, by the first line; for .tsv tab)"
    flags.text("--csv-separator --separator", "C", text, type=character)


def _add_table_columns(flags: Flags) -> None:
    flags.text("--csv-img-key", "COL", "image column of a table", default="filepath")
    _add_separator(flags)


def _add_lists(flags: Flags, of_alternatives: str = "") -> None:
    text = f"sentences: a list of texts is one caption; alternatives: it is several{of_alternatives}"
    flags.choice("--caption-lists", CAPTION_LISTS, CAPTION_LISTS[0], text)


def _add_out(flags: Flags, content: str, or_in_place: bool = False, summary: bool = True) -> None:
    where = flags.group.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help=f"folder for {content}")
    if or_in_place:
        where.add_argument("--in-place", action="store_true", help="replace each shard when its new file is complete")
    if summary:
        flags.text("--summary", "FILE", "write the counts to this file, as JSON")


def _add_range(flags: Flags, note: str = "") -> None:
    flags.text("--shard-range", "A:B", f"only shards number A to B - 1{note}")


def _add_shards_out(flags: Flags) -> None:
    _add_out(flags, "the new shards, under their old names, and sizes.json", or_in_place=True)
    _add_range(flags, "; the jobs of a SLURM array and the processes of srun divide them without this")


def _add_tables_flags(flags: Flags) -> None:
    flags.add_argument("tables", nargs="+", metavar="IN", help=_TABLES)
    _add_out(flags, "part-*.parquet and _summary.json")
    flags.text("--url-column", "COL", "column of image URLs (default: Image Path, url, URL, image_url)")
    flags.text("--key-column", "COL", "column of keys (default: key; else keys are made from URLs)")
    known = "column of raw captions (default: raw_caption, org_caption, caption, TEXT)"
    flags.text("--raw-caption-keys --raw-column", "COL", known)
    text = "columns of %s captions, and names to write them under (default: the published names%s)"
    for kind, further in (("long", ", vlm_caption, re_caption"), ("short", "")):
        flags.text(f"--{kind}-caption-keys --{kind}-columns", "COL[=NAME],..", text % (kind, further), type=names)
    _add_separator(flags)
    flags.add_argument("--no-quotes", action="store_true", help="read quotes as plain characters, as in many .tsv")
    _add_lists(flags, ", which a part can't hold")
    flags.switch("--keep-cut-off", "do not remove unfinished last sentences of long captions")
    flags.switch("--keep-without-long", "keep rows that have only a raw or short caption")
    flags.count("--rows-per-part", 20_000, "rows that a process has in memory")
    _add_workers(flags, most=8)


def _add_join_flags(flags: Flags) -> None:
    flags.add_argument("tables", nargs="+", metavar="IN", help=_TABLES)
    flags.add_argument("--shards", required=True, metavar="SHARDS", help=_SHARDS_TO_WRITE)
    _add_shards_out(flags)
    text = "url: match the url in table and JSON; key: match the table's key with the sample's name or the JSON's key, "
    text += "with or without folder and suffix (default: url if the first samples have one)"
    flags.choice("--match", ("url", "key"), None, text)
    flags.text("--key-column", "COL", "the table's column of keys or image names (default: key)")
    flags.text("--columns", "COL,..", "captions to add (default: all columns of text)", type=names)
    _add_lists(flags, ", and stays a list")
    flags.switch("--keep-existing", "never overwrite captions that samples have")
    _add_workers(flags)


def _add_inspect_flags(flags: Flags) -> None:
    flags.add_argument("shards", metavar="DATA", help=f"shards or tables, {_SHARDS}")
    _add_out(flags, "inspect.json and samples.html", summary=False)
    flags.text("--model", "NAME", "model whose tokenizer counts tokens", default="lotlip_bert-ViT-B-16")
    flags.text("--cache-dir", "DIR", "folder of the model's files, as in training.main")
    lengths = "report the fraction of captions longer than each (default: %(default)s, and the model's own)"
    flags.text("--context-lengths", "N,N", lengths, default="77,128,248,512", type=positive_numbers)
    keys = "caption keys (default: known keys, and those that end in caption or captions)"
    flags.text("--caption-keys", "K,K", keys, type=names)
    _add_lists(flags)
    _add_table_columns(flags)
    flags.whole("--show", 50, "samples on the page")
    flags.whole("--seed", 0, "seed of the choice of samples")
    flags.switch("--read-images", "decode every image instead of only its header")
    _add_range(flags)
    _add_workers(flags)


def _add_download_flags(flags: Flags) -> None:
    flags.add_argument("tables", metavar="IN", help="a Parquet table, or a folder of them, as `tables` writes them")
    _add_out(flags, "the shards and sizes.json")
    flags.count("--image-size", 256, "pixels")
    text = "img2dataset's resize mode; keep_ratio: reduce the shorter side to --image-size, leave smaller images"
    modes = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
    flags.choice("--resize-mode", modes, "keep_ratio", text)
    flags.count("--samples-per-shard", 10_000, "rows per shard")
    flags.count("--processes", os.cpu_count() or 1, "default: one per CPU core")
    flags.count("--threads", 64, "threads per process")
    flags.count("--timeout", 10, "seconds to wait for an image")
    flags.whole("--retries", 1, "retries per image")
    distributors = ("multiprocessing", "pyspark", "ray")
    flags.choice("--distributor", distributors, "multiprocessing", "one machine, or a cluster")
    flags.text("--img2dataset", "COMMAND", "img2dataset's command", default="img2dataset")
    text = "a further flag of it; may be repeated"
    flags.add_argument("--engine-flag", action="append", default=[], metavar="=--K=V", help=text)
    flags.switch("--print-command", "print img2dataset's command line, and stop")
    flags.switch("--check-only", "fetch nothing; only check the shards and write sizes.json")


def _add_split_flags(flags: Flags) -> None:
    flags.add_argument("table", metavar="TABLE", help="a table of images and captions, as --train-data reads them")
    _add_out(flags, "train.parquet and test.parquet", summary=False)
    flags.number("--test", 0.1, "fraction of the images")
    flags.whole("--seed", 0, "seed of the choice")
    _add_table_columns(flags)


def _add_recaption_flags(flags: Flags) -> None:
    flags.add_argument("shards", metavar="SHARDS", help=_SHARDS_TO_WRITE)
    _add_shards_out(flags)
    flags.add_argument("--vlm", required=True, metavar="NAME", help="the model: a folder, or a name on the hub")
    text = "write answers under KEY; PROMPT is detailed, short, visible, or any text; may be repeated"
    flags.add_argument("--caption", action="append", required=True, metavar="KEY=PROMPT", help=text)
    flags.choice("--engine", ("auto", "vllm", "transformers"), "auto", "auto (default): vLLM if it is installed")
    flags.count("--max-tokens", 256, "maximum number of tokens per caption")
    flags.count("--batch-size", None, "images per batch (default: 512 with vLLM, else 32)")
    text = """further arguments of vllm.LLM, e.g. '{"max_model_len": 4096, "gpu_memory_utilization": 0.8}'"""
    flags.text("--vllm-args", "JSON", text, type=json_object)
    flags.count("--tensor-parallel", 1, "GPUs that share one model, with vLLM")
    flags.text("--device", "DEV", "for example cpu or cuda:1 (default: a GPU, else cpu)")
    flags.text("--cache-dir", "DIR", "folder for downloads from the hub")


# Command -> (what it does, its module, function that adds its flags).
COMMANDS = {
    "tables": ("clean published caption tables into Parquet parts", "tables", _add_tables_flags),
    "download": ("fetch the images of such parts into shards, with img2dataset", "download", _add_download_flags),
    "join": ("add captions from tables to existing shards", "join", _add_join_flags),
    "split": ("divide images into train and test, near-duplicates on one side", "split", _add_split_flags),
    "inspect": ("statistics of shards or tables, and samples to look at", "inspect.run", _add_inspect_flags),
    "recaption": ("write long captions for images with a vision-language model", "recaption", _add_recaption_flags),
}
