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

from dataloaders import own_pairs
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark
from training.readers.faults import BadSample
from training.readers.files import EmbeddedImage, naming
from training.readers.table_files import COLUMNAR, check_image_path, local_spec, table_files

logger = logging.getLogger(__name__)
FLAG = "--retrieval-table"


def read_table_pairs(
    spec: str | Path,
    image_column: str | None,
    caption_keys: Sequence[str],
    rule: str,
    separator: str | None = None,
    lists: str = "alternatives",
    lines: bool = False,
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
        lines: each line of the ``.txt`` beside an image is a caption of its own.

    Raises:
        FileNotFoundError, ValueError: a file or a column is missing, a row lacks an image or a caption, a caption is
            not a text, or a row has too few or too many cells; the message names the row.
    """
    images: dict[object, Path | EmbeddedImage] = {}
    captions: dict[object, list[str]] = {}
    num_repeated = 0
    with naming(FLAG):
        paths = table_files(local_spec(str(spec)))
        for path in paths:
            for key, image, texts in _pairs(path, image_column, caption_keys, separator, lists, lines):
                num_repeated += key in images and key is not image
                images.setdefault(key, image)
                captions.setdefault(key, []).extend(texts)
    if num_repeated:
        logger.warning(
            f"{FLAG} {spec}: {num_repeated:,} rows hold the same bytes as the image of an earlier row; their captions "
            f"are further captions of that image, so there are {len(images):,} images"
        )
    pairs = [(images[key], texts) for key, texts in captions.items()]
    return own_pairs.as_set(own_pairs.set_name(str(spec), paths), pairs, rule)


def _pairs(
    path: Path, image_column: str | None, caption_keys: Sequence[str], separator: str | None, lists: str, lines: bool
) -> Iterator[tuple[object, Path | EmbeddedImage, list[str]]]:
    """Yields (a key that is equal for equal images, the image, its captions) for each row."""
    # --help has no time for pyarrow
    from training.readers.tables import caption_columns, choose_image_column, open_table, row_sample

    table, number = open_table(path, separator, strict=True), 0
    column = choose_image_column(table, image_column)
    columns = [column, *caption_columns(table, column, caption_keys, "--caption-keys")]
    rows = table.rows(columns) if path.suffix in COLUMNAR else iter(table.load(columns))
    try:
        for number, row in enumerate(rows, start=1):
            where = f"{path}: row {number:,}"
            texts = own_pairs.captions_of(row, caption_keys, lists, lines, where)
            sample = row_sample(path, number, row, column)
            if sample.image:
                key, image = blake2b(sample.image, digest_size=16).digest(), EmbeddedImage(path, column, number - 1)
            else:
                check_image_path(row.get(column), where)
                key = image = sample.image_path and Path(sample.image_path)
            if image is None or not texts:
                raise ValueError(f"{where} lacks an image or a caption; complete or remove it")
            yield key, image, texts
    except BadSample as error:
        raise ValueError(f"{path}: row {number + 1:,}: {error}") from error


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
                args.csv_separator,
                args.caption_lists,
                args.caption_lines,
            )
        ],
        group="own",
        metavar="TABLE",
        order=10,
        options=own_pairs.CAPTION_OPTIONS,
        old_flag="--retrieval-csv",
    ),
)
