"""`prepare split`: divides a table of images and captions into a train and a test part by the images' content.

Copies of an image, also smaller, recompressed or turned ones that look alike, stay in the same part: otherwise a model
is tested on what it was trained on. The result depends on the images and the seed, not on the order of the rows.
"""

import argparse
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from training.prepare.work import format_counts, write_json
from training.readers.files import parallel_map
from training.readers.images import BrokenImageError, load_rgb
from training.readers.table_files import table_files
from training.readers.tables import choose_image_column, load_rows, open_table
from training.runtime.files import atomic_write

SUMMARY = "_summary.json"
MOST_BITS = 6  # two images are near-duplicates if at most this many of 128 bits differ,
MOST_LEVELS = 12.0  # and their colours on a grid of 8 x 8 by at most this many of 255 levels on average


class Look(NamedTuple):
    """How an image looks.

    Attributes:
        content: hash of the image file.
        bits: [16] uint8: of a grid of 8 x 8, whether each place is brighter than its right and its lower neighbour.
        colours: [8, 8, 3] float32.
    """

    content: str
    bits: np.ndarray
    colours: np.ndarray


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if a part would be empty."""
    out = Path(args.out)
    if not 0 < args.test < 1:
        raise ValueError(f"--test {args.test:g}: expected a share between 0 and 1")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: not empty; name a new folder")
    rows, column = read_rows(args.table, args.csv_img_key, args.csv_separator)
    args.lease.take(out / ".jobs", "--out")
    counts: Counter = Counter()
    looks: dict[object, Look] = {}
    key_of_row = [_key(row[column]) for row in rows]
    sources = {key: _source(row[column]) for key, row in zip(key_of_row, rows)}
    for key, found in zip(sources, parallel_map(_look, list(sources.values()))):
        if isinstance(found, str):
            counts[found] += 1
        else:
            looks[key] = found
    keys = list(looks)
    groups = near_duplicates([looks[key] for key in keys])
    test = choose_test([looks[key].content for key in keys], groups, args.test, args.seed)
    is_test = dict(zip(keys, test))
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for key, row in zip(key_of_row, rows):
        if key in is_test:
            parts["test" if is_test[key] else "train"].append(row)
    for name, content in parts.items():
        with atomic_write(out / f"{name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(content or rows[:1]).slice(0, len(content)), path)
    summary = {"rows": len(rows), "images": len(sources), "groups": len(set(groups)), "unreadable": dict(counts)}
    summary |= {name: len(content) for name, content in parts.items()} | {"seed": args.seed}
    write_json(out / SUMMARY, summary)
    print(
        f"{len(rows):,} rows of {len(sources):,} images: {len(parts['train']):,} rows in train.parquet, "
        f"{len(parts['test']):,} in test.parquet, {len(rows) - sum(map(len, parts.values())):,} left out\n"
        f"images left out: {format_counts(counts)}; "
        f"{len(keys) - len(set(groups)):,} images are near-duplicates of another"
    )
    return 0 if all(parts.values()) else 1


def read_rows(spec: str, image_column: str, separator: str | None) -> tuple[list[dict], str]:
    """Reads all columns of tables; returns (rows, image column). Image paths become absolute.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not a table, or has no image column.
    """
    rows, column = [], image_column
    for path in table_files(spec):
        table = open_table(path, separator)
        column = choose_image_column(table, image_column)
        loaded = load_rows(table, table.names)
        for number in range(len(loaded)):
            row = dict(loaded[number])
            if isinstance(row.get(column), str):
                row[column] = os.path.abspath(path.parent / row[column])
            rows.append(row)
    if not rows:
        raise ValueError(f"{spec}: no rows")
    return rows, column


def _key(image: object) -> object:
    source = _source(image)
    return sha256(source).digest() if isinstance(source, bytes) else source


def _source(image: object) -> str | bytes:
    """Returns the path or the bytes in a cell; an empty text for an empty one."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return image or ""


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
    return Look(sha256(data).hexdigest(), np.packbits(np.concatenate(bits)), colours)


def near_duplicates(looks: list[Look]) -> list[int]:
    """Returns for each image the number of its group; near-duplicates of an image, and theirs, are in one group.

    If two images differ in at most `MOST_BITS` bits, at least one of `MOST_BITS` + 1 parts of the bits is equal, so
    only images that share a part are compared.
    """
    group = list(range(len(looks)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = group[group[number]]
            number = group[number]
        return number

    for part in np.array_split(np.arange(16), MOST_BITS + 1):
        buckets: dict[bytes, list[int]] = {}
        for number, look in enumerate(looks):
            buckets.setdefault(look.bits[part].tobytes(), []).append(number)
        for bucket in buckets.values():
            bits, colours = (np.stack([getattr(looks[n], name) for n in bucket]) for name in ("bits", "colours"))
            for place, number in enumerate(bucket[:-1]):
                differing = np.unpackbits(bits[place + 1 :] ^ bits[place], axis=1).sum(axis=1)
                for other in np.flatnonzero(differing <= MOST_BITS):
                    if np.abs(colours[place + 1 + other] - colours[place]).mean() <= MOST_LEVELS:
                        group[root(bucket[place + 1 + other])] = root(number)
    return [root(number) for number in range(len(looks))]


def choose_test(contents: list[str], groups: list[int], share: float, seed: int) -> list[bool]:
    """Returns for each image whether it is in the test part, about `share` of the images.

    Args:
        contents: hash of each image file.
        groups: `near_duplicates`; a group is never divided.
        share: fraction of the images.
        seed: seed of the choice.
    """
    names: dict[int, str] = {}
    for content, group in zip(contents, groups):
        names[group] = min(content, names.get(group, content))
    sizes, chosen, number = Counter(groups), set(), 0
    for group in sorted(names, key=lambda g: sha256(f"{seed}/{names[g]}".encode()).digest()):
        if number + sizes[group] <= max(1, round(share * len(groups))):
            chosen.add(group)
            number += sizes[group]
    return [group in chosen for group in groups]
