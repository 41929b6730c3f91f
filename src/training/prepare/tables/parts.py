"""Cleans, counts and writes the rows of one part of a caption table; runs in worker processes."""

import json
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
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


def clean_part(task: tuple[list[Row], Columns, Path], rules: Rules) -> None:
    """Writes the good rows of a part, and the counts as metadata.

    A row is kept if it has a usable long caption, or any usable caption if the table has no long ones or the rules say
    so.

    Args:
        task: rows, with the cells of `columns.wanted`; the columns; and the file to write.
        rules: how every row is cleaned.

    Raises:
        ValueError: a cell holds several alternatives, but a part has one caption in each column.
    """
    rows, columns, target = task
    kinds, good, names = Counter(rows=len(rows)), [], columns.wanted
    for cells, repaired in rows:
        row = dict(zip(names, cells or ()))
        url, key = cell_name(row.get(columns.url)), cell_name(row.get(columns.key))
        if (not url and not key) or (url and not is_public(url)):
            kinds["bad_url" if url else "malformed"] += 1
        else:
            good.append((row, repaired, url or None, key or f"{hash_text(url):016x}"))
    cleaned, counts = {}, {}
    for source, name in columns.captions.items():
        how = {"generated": name != RAW, "long": source in columns.long, "trim": rules.trim}
        found = [clean_caption(_one_text(row[source], rules.lists), **how) for row, *_ in good]
        cleaned[name] = found
        counts[name] = dict.fromkeys(CAPTION_KINDS, 0) | Counter(c.fault or "kept" for c in found)
        counts[name]["repaired"] = sum(c.repaired or row[1] and not c.fault for c, row in zip(found, good))
        counts[name]["cut_off"] = sum(c.cut_off for c in found)
    needed = columns.long.values() if columns.long and not rules.keep_without_long else cleaned
    keep = [any(c.text for c in captions) for captions in zip(*(cleaned[name] for name in needed))]
    for is_kept, captions in zip(keep, zip(*cleaned.values())):
        was_refused = any(c.fault == "refused" for c in captions)
        kinds["kept" if is_kept else "refused" if was_refused else "empty"] += 1
    content = dict(zip((URL, KEY), zip(*(row[2:] for row in good)))) if good else {}
    content |= {name: [c.text for c in captions] for name, captions in cleaned.items()}
    note = {_COUNTS: json.dumps(dict.fromkeys(ROW_KINDS, 0) | kinds | {"captions": counts})}
    schema = pa.schema([(name, pa.string()) for name in (URL, KEY, *rules.captions)], note)
    arrays = [pa.array(content.get(name, [None] * len(good)), pa.string()) for name in schema.names]
    _write(pa.Table.from_arrays(arrays, schema=schema).filter(pa.array(keep, pa.bool_())), target)


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
