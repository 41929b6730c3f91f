"""A user's own pairs of images and captions in tables.

A table has a column of image paths, which are relative to the table's folder, and one or more columns of captions.
Parquet may hold the images themselves, as data sets on the Hugging Face hub do. Rows that name the same image give it
further captions. Captions are left unchanged, unless the rule of the long benchmarks is chosen.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataloaders.own_set import CAPTION_KEYS, CAPTION_RULE, as_set
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark, Option
from training.readers.captions import caption_texts
from training.readers.csv_rows import BadRows, CsvRecords, choose_form, default_separator
from training.readers.files import EmbeddedImage
from training.readers.table_files import COLUMNAR, check_image_path, table_files

logger = logging.getLogger(__name__)


def read_table_pairs(
    spec: str | Path, image_column: str, caption_columns: Sequence[str], rule: str, separator: str | None = None
) -> RetrievalSet:
    """Reads pairs from tables.

    Args:
        spec: one or several files, or a folder; see `table_files`.
        image_column: column of paths, absolute or relative to the table's folder, or in Parquet of the images
            themselves.
        caption_columns: columns of texts, or in Parquet of lists of texts. Columns that the table lacks and empty
            texts are ignored.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        separator: separator of a CSV; None means a comma, or a tab in ``.tsv``.

    Raises:
        FileNotFoundError, ValueError: a file or a column is missing, a row lacks an image or a caption, a caption is
            not a text, or a row has too few or too many cells; the message names the row.
    """
    try:
        paths = table_files(str(spec))
        if separator and all(path.suffix in COLUMNAR for path in paths):
            raise ValueError(f"{paths[0]}: --csv-separator has no effect on it")
        captions: dict[object, list[str]] = {}
        for path in paths:
            for image, texts in _pairs(path, image_column, caption_columns, separator):
                captions.setdefault(image, []).extend(texts)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--retrieval-csv {error}") from error
    return as_set(_name(str(spec), paths), captions.items(), rule)


def _name(spec: str, paths: Sequence[Path]) -> str:
    """Returns the name of the set: the name of a single file, or of the folder that holds several."""
    if len(paths) == 1 and not Path(spec).is_dir():
        return paths[0].stem
    return (Path(spec) if Path(spec).is_dir() else paths[0].parent).resolve().name


def _pairs(
    path: Path, image_column: str, caption_columns: Sequence[str], separator: str | None
) -> Iterator[tuple[Path | EmbeddedImage, list[str]]]:
    if path.suffix in COLUMNAR:
        from training.readers.columnar import ColumnarFile, choose_image_column  # --help has no time for pyarrow

        file = ColumnarFile(path)
        image_column = choose_image_column(path, file.names, file.image_columns, image_column) or image_column
    else:
        file = _CsvFile(path, separator)
    wanted = [column for column in caption_columns if column in file.names]
    if image_column not in file.names or not wanted:
        raise ValueError(
            f"{path}: its columns are {', '.join(file.names)} (the first line of a CSV is its header); "
            f"expected the image column {image_column!r} (--csv-img-key) and one of {', '.join(caption_columns)} "
            "(--retrieval-caption-keys)"
        )
    for number, row in enumerate(file.rows(image_column, wanted), start=1):
        where = f"{path}: row {number:,}"
        own = [text for column in wanted for text in caption_texts(row[column], f"{where}, column {column}")]
        image = _image_of(row[image_column], path, image_column, number, where)
        if image is None or not own:
            raise ValueError(f"{where} lacks an image or a caption; complete or remove it")
        yield image, own


def _image_of(value: object, path: Path, column: str, number: int, where: str) -> Path | EmbeddedImage | None:
    if isinstance(value, dict) and ("bytes" in value or "path" in value):  # the form of Hugging Face's data sets
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return EmbeddedImage(path, column, number - 1) if value else None
    image_path = check_image_path(value, where)
    return path.parent / image_path if image_path else None


class _CsvFile:
    """A CSV in which any bad row is an error; the counterpart of `ColumnarFile`."""

    def __init__(self, path: Path, separator: str | None):
        self.path = path
        self.form, self.names = choose_form(path, separator or default_separator(path))
        if not self.form.quoted:
            logger.warning(
                f"--retrieval-csv {path}: no cell is quoted, so quotation marks are read as plain characters"
            )

    def rows(self, image_column: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
        """Yields each row as a dict of column -> text; raises ValueError at the end if a row was bad."""
        records, bad = CsvRecords(self.path, self.form, len(self.names)), BadRows(self.path, self.form, self.names)
        for record in records.read(records.header()[1]):
            if record.cells is None or record.repaired:
                bad.add(record)
            elif not bad.count:
                yield {name: cell for name, cell in zip(self.names, record.cells) if name in (image_column, *columns)}
        if bad.count:
            raise ValueError(
                f"{self.path}: {bad.describe()}; put cells that hold {self.form.separator!r} into double quotes, and "
                "write a quotation mark inside one twice"
            )


IMAGE_KEY = Option(
    "--csv-img-key",
    "image column: paths, or the images themselves (default: %(default)s, else the only column of images)",
    metavar="COL",
    default="filepath",
    aliases=("--image-key",),
    of_training=True,
)


BENCHMARKS = (
    Benchmark(
        "retrieval-csv",
        "--retrieval-csv",
        "table of pairs: .csv, .tsv, .parquet, several of them, or a folder of a Hugging Face data set (--csv-img-key)",
        lambda args: [
            read_table_pairs(
                args.retrieval_csv,
                args.csv_img_key,
                args.retrieval_caption_keys,
                args.retrieval_caption_rule,
                getattr(args, "csv_separator", None),
            )
        ],
        group="own",
        metavar="TABLE",
        order=10,
        options=(IMAGE_KEY, CAPTION_KEYS, CAPTION_RULE),
    ),
)
