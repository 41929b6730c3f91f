"""A user's own pairs of images and captions in tables.

A table has a column of image paths, which are relative to the table's folder, and one or more columns of captions.
Parquet may hold the images themselves, as data sets on the Hugging Face hub do. Rows with the same image path, or the
same bytes of an image, give one image further captions. Captions are left unchanged, unless the rule of the long
benchmarks is chosen.
"""

import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from dataloaders.own_set import CAPTION_KEYS, CAPTION_LISTS, CAPTION_RULE, as_set, present_keys
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark, Option
from training.readers.captions import RecordError, caption_texts
from training.readers.files import EmbeddedImage
from training.readers.hub import local_spec
from training.readers.table_files import COLUMNAR, beside, check_image_path, table_files

logger = logging.getLogger(__name__)
FLAG = "--retrieval-table"


def read_table_pairs(
    spec: str | Path,
    image_column: str | None,
    caption_keys: Sequence[str],
    rule: str,
    separator: str | None = None,
    lists: str = "alternatives",
) -> RetrievalSet:
    """Reads pairs from tables.

    Args:
        spec: one or several files, or a folder; see `table_files`.
        image_column: column of paths, absolute or relative to the table's folder, or in Parquet of the images
            themselves; see `choose_image_column`.
        caption_keys: columns of captions; see `caption_texts`. Columns that the table lacks are ignored.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        separator: separator of a CSV; see `choose_form`.
        lists: see `caption_texts`.

    Raises:
        FileNotFoundError, ValueError: a file or a column is missing, a row lacks an image or a caption, a caption is
            not a text, or a row has too few or too many cells; the message names the row.
    """
    try:
        paths = table_files(local_spec(str(spec)))
        if separator and all(path.suffix in COLUMNAR for path in paths):
            raise ValueError(f"{paths[0]}: --csv-separator has no effect on it")
        images: dict[object, Path | EmbeddedImage] = {}
        captions: dict[object, list[str]] = {}
        num_repeated = 0
        for path in paths:
            for mark, image, texts in _pairs(path, image_column, caption_keys, separator, lists):
                num_repeated += mark in images and mark is not image
                images.setdefault(mark, image)
                captions.setdefault(mark, []).extend(texts)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{FLAG} {error}") from error
    if num_repeated:
        logger.warning(
            f"{FLAG} {spec}: {num_repeated:,} rows hold the same bytes as the image of an earlier row; their captions "
            f"are further captions of that image, so there are {len(images):,} images"
        )
    pairs = [(images[mark], texts) for mark, texts in captions.items()]
    return as_set(_name(str(spec), paths), pairs, rule)


def _name(spec: str, paths: Sequence[Path]) -> str:
    """Returns the name of the set: the name of a single file, or of the folder that holds several."""
    if spec.startswith("hf:"):
        return spec.removeprefix("hf:").rstrip("/").rsplit("/", 1)[-1].split(":")[0]
    if len(paths) == 1 and not Path(spec).is_dir():
        return paths[0].stem
    return (Path(spec) if Path(spec).is_dir() else paths[0].parent).resolve().name


def _pairs(
    path: Path, image_column: str | None, caption_keys: Sequence[str], separator: str | None, lists: str
) -> Iterator[tuple[object, Path | EmbeddedImage, list[str]]]:
    """Yields (what tells the image from others, the image, its captions) for each row."""
    # --help has no time for pyarrow
    from training.readers.tables import caption_columns, choose_image_column, open_table

    table = open_table(path, separator, strict=True)
    column = choose_image_column(table, image_column)
    wanted = present_keys(caption_keys, caption_columns(table, column, caption_keys, "--caption-keys"))
    rows = table.rows([column, *wanted]) if path.suffix in COLUMNAR else iter(table.load([column, *wanted]))
    number = 0
    while True:
        number += 1
        where = f"{path}: row {number:,}"
        try:
            row = next(rows, None)
        except RecordError as error:
            raise ValueError(f"{where}: {error}") from error
        if row is None:
            return
        own = [text for name in wanted for text in caption_texts(row.get(name), f"{where}, column {name}", lists)]
        mark, image = _image_of(row.get(column), path, column, number, where)
        if image is None or not own:
            raise ValueError(f"{where} lacks an image or a caption; complete or remove it")
        yield mark, image, own


def _image_of(
    value: object, path: Path, column: str, number: int, where: str
) -> tuple[object, Path | EmbeddedImage | None]:
    if isinstance(value, dict) and ("bytes" in value or "path" in value):  # the form of Hugging Face's data sets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return blake2b(value, digest_size=16).digest(), EmbeddedImage(path, column, number - 1) if value else None
    name = check_image_path(value, where)
    image = Path(beside(path, name)) if name else None
    return image, image


IMAGE_KEY = Option(
    "--csv-img-key",
    "image column: paths, or the images themselves (default: %(default)s, else the only column of images, or the only "
    "one of file_name, image, image_path, ..)",
    metavar="COL",
    default="filepath",
    aliases=("--image-key",),
    of_training=True,
)


BENCHMARKS = (
    Benchmark(
        "retrieval-csv",
        FLAG,
        "table of pairs: .csv, .tsv, .json, .jsonl, .parquet, .arrow, several of them, a folder of these or of images "
        "with NAME.txt, or hf:ORG/NAME:SPLIT (--csv-img-key)",
        lambda args: [
            read_table_pairs(
                args.retrieval_table,
                args.csv_img_key,
                args.retrieval_caption_keys,
                args.retrieval_caption_rule,
                getattr(args, "csv_separator", None),
                args.caption_lists,
            )
        ],
        group="own",
        metavar="TABLE",
        order=10,
        options=(IMAGE_KEY, CAPTION_KEYS, CAPTION_RULE, CAPTION_LISTS),
        old_flag="--retrieval-csv",
    ),
)
