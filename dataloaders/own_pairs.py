"""A user's own pairs of images and captions: a table, or tar shards as a training reads them.

TABLE  .csv, .tsv or .parquet: a column of image paths (relative to the table), one or more columns of captions
SHARDS .tar: KEY.jpg (.jpeg, .png, .webp) with KEY.txt, or with captions in KEY.json

Rows that name the same image are further captions of it. Captions stay as they are, unless the rule of the long
benchmarks is asked for.
"""

import csv
import glob
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataloaders.captions import normalise_caption
from dataloaders.files import ShardMember
from dataloaders.pairs import RetrievalSet, several_captions_per_image
from dataloaders.registry import Benchmark, Option
from dataloaders.values import names

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_RULES = ("raw", "long")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_table_pairs(path: str | Path, image_column: str, caption_columns: Sequence[str], rule: str) -> RetrievalSet:
    """Reads pairs from a table.

    Args:
        path: ``.csv`` or ``.tsv`` with a header, or ``.parquet``.
        image_column: paths, absolute or relative to the table's folder.
        caption_columns: of texts, or in Parquet lists of texts; those that are there are read, empty ones are none.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.

    Raises:
        FileNotFoundError, ValueError: no such file, no such column, or a row without a caption.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--retrieval-csv {path}: no such file")
    columns, rows = _read_table(path)
    wanted = [column for column in caption_columns if column in columns]
    if image_column not in columns or not wanted:
        raise ValueError(
            f"--retrieval-csv {path}: its columns are {', '.join(columns)}; expected the image column {image_column!r} "
            f"(--csv-img-key) and one of {', '.join(caption_columns)} (--retrieval-caption-keys)"
        )
    captions: dict[Path, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        values = [row[column] for column in wanted if row.get(column)]
        own = [text for value in values for text in ([value] if isinstance(value, str) else value) if text]
        if not row.get(image_column) or not own:
            raise ValueError(f"--retrieval-csv {path}: row {number} lacks an image or a caption; complete or remove it")
        captions.setdefault(path.parent / row[image_column], []).extend(own)
    return _as_set(path.stem, captions.items(), rule)


def _read_table(path: Path) -> tuple[list[str], list[dict]]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"--retrieval-csv {path}: not a readable table ({error})") from error
        return table.column_names, table.to_pylist()
    if path.suffix not in _SEPARATORS:
        raise ValueError(f"--retrieval-csv {path}: expected .csv, .tsv or .parquet")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=_SEPARATORS[path.suffix])
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"--retrieval-csv {path}: not a readable table ({error})") from error
        return list(reader.fieldnames or ()), rows


def read_shard_pairs(shards: str, caption_keys: Sequence[str], rule: str) -> RetrievalSet:
    """Reads pairs from local tar shards; the images stay inside and are read from there.

    Args:
        shards: files with ``{000..123}`` or ``*``, or a folder (its ``*.tar``).
        caption_keys: of ``.json``: texts or lists of texts; all that are there count. ``.txt`` is used without any.
        rule: as `read_table_pairs`.

    Raises:
        FileNotFoundError, ValueError: no such shard, a broken one, or a sample without an image or a caption.
    """
    pairs = []
    paths = _expand(shards)
    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                pairs += _read_shard(path, tar, caption_keys)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"--retrieval-wds {path}: not a readable tar file ({error})") from error
    return _as_set(paths[0].parent.resolve().name, pairs, rule)


def _expand(shards: str) -> list[Path]:
    from braceexpand import braceexpand

    if "://" in shards or shards.startswith("pipe:"):
        raise ValueError(f"--retrieval-wds {shards}: expected local files; download them first")
    if Path(shards).is_dir():
        shards = str(Path(shards) / "*.tar")
    found = []
    for name in braceexpand(shards):
        matches = sorted(glob.glob(name))
        if not matches:
            raise FileNotFoundError(f"--retrieval-wds {name}: no such file")
        found += matches
    return [Path(name) for name in found]


def _read_shard(path: Path, tar: tarfile.TarFile, caption_keys: Sequence[str]) -> list[tuple[ShardMember, list[str]]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")  # as webdataset: the suffix begins at the first full stop
            samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    pairs = []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        captions = _captions_of(tar, files, caption_keys, f"--retrieval-wds {path}: sample {key.strip('/')}")
        if image is None or not captions:
            raise ValueError(
                f"--retrieval-wds {path}: sample {key.strip('/')} lacks an image or a caption (found "
                f"{', '.join(sorted(files))}; captions are looked for in .json under {', '.join(caption_keys)}, "
                f"--retrieval-caption-keys, else in .txt)"
            )
        pairs.append((ShardMember(path, image.offset_data, image.size, image.name), captions))
    return pairs


def _captions_of(tar: tarfile.TarFile, files: dict, keys: Sequence[str], where: str) -> list[str]:
    captions: list[str] = []
    try:
        if "json" in files:
            record = json.loads(tar.extractfile(files["json"]).read().decode())
            found = [record[key] for key in keys if record.get(key)] if isinstance(record, dict) else []
            captions = [text for value in found for text in ([value] if isinstance(value, str) else value)]
        if not captions and "txt" in files:
            captions = [tar.extractfile(files["txt"]).read().decode().strip()]
    except ValueError as error:
        raise ValueError(f"{where}: broken caption ({error})") from error
    return [text for text in captions if isinstance(text, str) and text]


def _as_set(name: str, pairs: Iterable[tuple], rule: str) -> RetrievalSet:
    apply = normalise_caption if rule == "long" else str
    pairs = [(image, [apply(text) for text in captions]) for image, captions in pairs]
    return several_captions_per_image(f"{name}-retrieval", name, pairs, source="your own pairs")


CAPTION_KEYS = Option(
    "--retrieval-caption-keys",
    "their captions: columns of the table, keys in a shard's .json (default: caption)",
    metavar="KEYS",
    default=("caption",),
    type=names,
    aliases=("--caption-keys",),
)
CAPTION_RULE = Option(
    "--retrieval-caption-rule",
    "captions as they are, or split and joined as in the long benchmarks (default: %(default)s)",
    default="raw",
    choices=CAPTION_RULES,
)
IMAGE_KEY = Option(
    "--csv-img-key",
    "image column (default: %(default)s)",
    metavar="COL",
    default="filepath",
    aliases=("--image-key",),
    of_training=True,
)

BENCHMARKS = (
    Benchmark(
        "retrieval-csv",
        "--retrieval-csv",
        "table of pairs, .csv, .tsv or .parquet (--csv-img-key)",
        lambda args: [
            read_table_pairs(
                args.retrieval_csv, args.csv_img_key, args.retrieval_caption_keys, args.retrieval_caption_rule
            )
        ],
        group="own",
        metavar="FILE",
        order=10,
        options=(IMAGE_KEY, CAPTION_KEYS, CAPTION_RULE),
    ),
    Benchmark(
        "retrieval-wds",
        "--retrieval-wds",
        "local tar shards of pairs: '{000..004}.tar' or a folder",
        lambda args: [read_shard_pairs(args.retrieval_wds, args.retrieval_caption_keys, args.retrieval_caption_rule)],
        group="own",
        metavar="TARS",
        order=20,
        options=(CAPTION_KEYS, CAPTION_RULE),
    ),
)
