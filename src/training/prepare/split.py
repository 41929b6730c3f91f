"""`prepare split`: divides a table of images and captions into a train and a test part by the images' content.

Copies of an image, also smaller, recompressed or turned ones that look alike, stay in the same part: otherwise a model
is tested on what it was trained on. The result depends on the images and the seed, not on the order of the rows.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from training.prepare.columns import open_large
from training.prepare.shards import content_mark
from training.prepare.work import SUMMARY, format_counts, start_folder, write_json
from training.readers.files import parallel_map
from training.readers.images import BrokenImageError, load_rgb
from training.readers.table_files import local_spec, table_files
from training.readers.tables import choose_image_column, row_sample
from training.runtime.files import atomic_write

MOST_BITS = 6  # two images are near-duplicates if at most this many of 128 bits differ,
MOST_LEVELS = 12.0  # and their colours on a grid of 8 x 8 by at most this many of 255 levels on average
_COMPARED_AT_ONCE = 256  # images, with all others


class Look(NamedTuple):
    """How an image looks.

    Attributes:
        content: hash of the image file.
        bits: [128] float32: of a grid of 8 x 8, 1 for a place brighter than its right or lower neighbour, else -1.
        colours: [8, 8, 3] float32.
    """

    content: str
    bits: np.ndarray
    colours: np.ndarray


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if a part would be empty."""
    if not 0 < args.test < 1:
        raise ValueError(f"--test {args.test:g}: expected a fraction between 0 and 1")
    paths = table_files(local_spec(args.table))
    rows, images, num_malformed = read_rows(paths, args.csv_img_key, args.csv_separator)
    settings = {"tables": [content_mark(path) for path in paths], "image": args.csv_img_key}
    start_folder(args, ".split", settings | {"test": args.test, "seed": args.seed})
    keys = [sha256(image).digest() if isinstance(image, bytes) else image for image in images]
    sources = dict(zip(keys, images))
    found = dict(zip(sources, parallel_map(_look, list(sources.values()))))
    looks = {key: look for key, look in found.items() if isinstance(look, Look)}
    groups = near_duplicates(list(looks.values()))
    is_test = dict(zip(looks, choose_test([look.content for look in looks.values()], groups, args.test, args.seed)))
    sides = pa.array([is_test.get(key) for key in keys], pa.bool_())
    num_rows = {"train": sides.false_count, "test": sides.true_count}
    for name, chosen in (("train", pc.invert(sides)), ("test", sides)):
        with atomic_write(Path(args.out) / f"{name}.parquet") as path:
            pq.write_table(rows.filter(chosen), path)
    counts = Counter({"malformed row": num_malformed}) + Counter(
        kind for kind in found.values() if isinstance(kind, str)
    )
    summary = {"rows": len(rows) + num_malformed, "images": len(sources), "groups": len(set(groups))}
    write_json(Path(args.out) / SUMMARY, summary | {"unreadable": counts} | num_rows | {"seed": args.seed})
    print(
        f"{summary['rows']:,} rows of {len(sources):,} images: {num_rows['train']:,} rows in train.parquet, "
        f"{num_rows['test']:,} in test.parquet, {summary['rows'] - sum(num_rows.values()):,} left out\n"
        f"left out: {format_counts(counts)}; {len(looks) - len(set(groups)):,} images are near-duplicates of another"
    )
    return 0 if all(num_rows.values()) else 1


def read_rows(
    paths: Sequence[Path], image_column: str, separator: str | None
) -> tuple[pa.Table, list[str | bytes], int]:
    """Reads all columns of tables.

    Returns:
        The rows, with absolute paths; the image of each, as a path, bytes, or an empty text; and how many rows can't be
        read.

    Raises:
        ValueError: a file is not a table, or has no image column.
    """
    rows: list[dict] = []
    images: list[str | bytes] = []
    num_malformed = 0
    for path in paths:
        table = open_large(path, separator)
        column = choose_image_column(table, image_column)
        for cells, _ in table.stream(table.names):
            if cells is None:
                num_malformed += 1
                continue
            row = dict(zip(table.names, cells))
            sample = row_sample(path, len(rows), row, column)
            outside = os.path.abspath(sample.image_path) if sample.image_path else ""
            rows.append(row | {column: outside} if isinstance(row[column], str) else row)
            images.append(sample.image or outside)
    if not rows:
        raise ValueError(f"{paths[0]}: no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, cells in columns.items():  # in JSON lines, a caption may be a text in one row and a list in another
        if any(isinstance(cell, list) for cell in cells):
            columns[name] = [[cell] if isinstance(cell, str) else cell for cell in cells]
    return pa.table(columns), images, num_malformed


def _look(source: str | bytes) -> Look | str:
    """Returns how an image looks, or the kind of fault if it can't be read."""
    if not source:
        return "no image"
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = load_rgb(data, at_least=64, upright=True)
    except BrokenImageError as error:
        return error.kind
    except OSError:
        return "no such file"
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = [grey[:8, 1:] > grey[:8, :8], grey[1:, :8] > grey[:8, :8]]
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)
    return Look(sha256(data).hexdigest(), np.where(np.concatenate(bits, axis=None), 1, -1).astype(np.float32), colours)


def near_duplicates(looks: list[Look]) -> list[int]:
    """Returns for each image the number of its group; near-duplicates of an image, and theirs, are in one group."""
    group = np.arange(len(looks))
    bits = np.array([look.bits for look in looks], dtype=np.float32).reshape(-1, 128)
    for first in range(0, len(looks), _COMPARED_AT_ONCE):
        equal_less_different = bits[first : first + _COMPARED_AT_ONCE] @ bits.T
        for number, other in np.argwhere(equal_less_different >= 128 - 2 * MOST_BITS) + (first, 0):
            if other < number and np.abs(looks[other].colours - looks[number].colours).mean() <= MOST_LEVELS:
                group[group == group[number]] = group[other]
    return group.tolist()


def choose_test(contents: list[str], groups: list[int], fraction: float, seed: int) -> list[bool]:
    """Returns for each image whether it is in the test part, about `fraction` of the images.

    Args:
        contents: hash of each image file.
        groups: `near_duplicates`; a group is never divided.
        fraction: of the images.
        seed: seed of the choice.
    """
    names: dict[int, str] = {}
    for content, group in zip(contents, groups):
        names[group] = min(content, names.get(group, content))
    sizes, chosen, number = Counter(groups), set(), 0
    for group in sorted(names, key=lambda g: sha256(f"{seed}/{names[g]}".encode()).digest()):
        if number + sizes[group] <= max(1, round(fraction * len(groups))):
            chosen.add(group)
            number += sizes[group]
    return [group in chosen for group in groups]
