"""Cleans, counts and writes the rows of one part of a caption table; runs in worker processes."""

import json
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.prepare.rows import Row, cell_name, cell_texts
from training.prepare.tables.clean import clean_caption
from training.prepare.tables.columns import KEY, RAW, URL, Columns
from training.prepare.work import hash_text
from training.runtime.files import atomic_write

_PRIVATE_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp")
_COUNTS = b"counts"  # in the metadata of a part
ROW_KINDS = ("rows", "kept", "duplicates", "empty", "refused", "malformed", "bad_url")
CAPTION_KINDS = ("kept", "empty", "refused", "repaired", "cut_off")


@dataclass(frozen=True)
class Rules:
    """How every row is cleaned.

    Attributes:
        captions: caption columns to write, in order; columns that a table lacks are null.
        trim: remove incomplete last sentences.
        keep_without_long: keep rows without a usable long caption.
        lists: see `caption_texts`.
    """

    captions: list[str]
    trim: bool
    keep_without_long: bool
    lists: str


class Task(NamedTuple):
    """Rows to be cleaned, with the cells of `columns.wanted`, and the file to write."""

    rows: list[Row]
    columns: Columns
    rules: Rules
    target: Path


def clean_part(task: Task) -> None:
    """Writes the good rows of a part, and the counts as metadata.

    Raises:
        ValueError: a cell holds several alternatives, but a part has one caption in each column.
    """
    kinds, kept = Counter(), []
    captions = {name: Counter(dict.fromkeys(CAPTION_KINDS, 0)) for name in task.columns.captions.values()}
    for cells, repaired in task.rows:
        row = (
            "malformed"
            if cells is None
            else _clean_row(dict(zip(task.columns.wanted, cells)), repaired, task, captions)
        )
        kinds["kept" if isinstance(row, dict) else row] += 1
        if isinstance(row, dict):
            kept.append(row)
    counts = dict.fromkeys(ROW_KINDS, 0) | kinds | {"rows": len(task.rows), "captions": captions}
    fields = [(name, pa.string()) for name in (URL, KEY, *task.rules.captions)]
    _write(pa.Table.from_pylist(kept, pa.schema(fields, {_COUNTS: json.dumps(counts)})), task.target)


def _clean_row(row: dict, repaired: bool, task: Task, counts: dict[str, Counter]) -> dict | str:
    """Returns the row to write, or the kind of row as which it is dropped; counts its captions.

    A row is kept if it has a usable long caption, or any usable caption if the table has no long ones or the rules say
    so.
    """
    columns, rules = task.columns, task.rules
    url, key = (cell_name(row[name]) if name else "" for name in (columns.url, columns.key))
    if not url and not key:
        return "malformed"
    if url and not is_public(url):
        return "bad_url"
    texts, faults = {}, set()
    for source, name in columns.captions.items():
        caption = clean_caption(_one_text(row[source], rules.lists), name != RAW, source in columns.long, rules.trim)
        texts[name] = caption.text
        faults.add(caption.fault)
        counts[name][caption.fault or "kept"] += 1
        if caption.repaired or repaired and not caption.fault:
            counts[name]["repaired"] += 1
        if caption.cut_off:
            counts[name]["cut_off"] += 1
    needed = columns.long.values() if columns.long and not rules.keep_without_long else texts
    if not any(texts[name] for name in needed):
        return "refused" if "refused" in faults else "empty"
    return {URL: url or None, KEY: key or f"{hash_text(url):016x}"} | texts


def _one_text(cell: object, lists: str) -> str | None:
    if isinstance(cell, str) and cell.isascii():  # nearly all
        return cell
    texts = cell_texts(cell, lists)
    if len(texts) > 1:
        raise ValueError(
            f"a cell holds {len(texts)} captions ({texts[0][:40]!r}, ..), a part one in each column; if they are the "
            "sentences of one caption, add --caption-lists sentences"
        )
    return texts[0] if texts else None


def is_public(url: str) -> bool:
    """Returns whether a URL is of http or https, and its host not an address or name of a private network.

    A text without ``://`` can't be fetched, so it is left to img2dataset's counts.
    """
    if "://" not in url:
        return True
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
    except ValueError:
        return False
    if parts.scheme.lower() not in ("http", "https") or not host:
        return False
    last = host.rpartition(".")[2]
    if not last[:1].isdigit() and ":" not in host:  # a name
        return last not in _PRIVATE_NAMES
    try:
        return ip_address(host).is_global
    except ValueError:
        return False  # 127.1 is an address, too


def read_counts(path: Path) -> dict:
    """Returns the counts of a cleaned part: of `ROW_KINDS`, and under ``captions`` by column of `CAPTION_KINDS`."""
    return json.loads(pq.read_schema(path).metadata[_COUNTS])


def drop_rows(job: tuple[Path, np.ndarray]) -> None:
    """Removes rows from a cleaned part, and the part if none is left.

    Args:
        job: (the part, bool [num_rows] that says which rows to keep).
    """
    path, keep = job
    if keep.any():
        _write(pq.read_table(path).filter(pa.array(keep)), path)
    else:
        path.unlink()


def _write(rows: pa.Table, target: Path) -> None:
    with atomic_write(target) as path:
        # Captions are all different, so a dictionary would enlarge the file; statistics of their range are useless.
        pq.write_table(rows, path, compression="zstd", use_dictionary=False, write_statistics=[URL, KEY])
