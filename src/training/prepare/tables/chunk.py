"""Cleans, counts and writes the rows of one chunk of a caption table; runs in worker processes."""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.prepare.tables.clean import clean_captions
from training.prepare.tables.columns import KEY, RAW, URL
from training.prepare.tables.records import Chunk, Rows, Table, read_rows
from training.prepare.work import add_counts, load_json, write_json
from training.runtime.files import atomic_write

_PRIVATE_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp")
ROW_GROUP = 4_000  # rows that a worker keeps in memory: 25 MB of dicts and Arrow
ROW_KINDS = ("rows", "kept", "duplicates", "empty", "refused", "malformed", "bad_url")
CAPTION_KINDS = ("kept", "empty", "refused", "repaired", "cut_off")


@dataclass(frozen=True)
class Rules:
    """How every row is cleaned.

    Attributes:
        captions: caption columns to write, in order; columns that a table lacks are null.
        trim: remove incomplete last sentences.
        keep_without_long: keep rows without a usable long caption.
    """

    captions: tuple[str, ...]
    trim: bool
    keep_without_long: bool

    @property
    def schema(self) -> pa.Schema:
        """Schema of the parts: url, key, raw_caption, long captions, short captions."""
        return pa.schema([(name, pa.string()) for name in (URL, KEY, *self.captions)])


@dataclass(frozen=True)
class Task:
    """One chunk to be cleaned.

    Attributes:
        table: the input.
        chunk: the part of it to clean.
        rules: how to clean it.
        base: common part of the results' paths: ``BASE.arrow``, ``BASE.npy``, ``BASE.json``.
    """

    table: Table
    chunk: Chunk
    rules: Rules
    base: Path

    def file(self, suffix: str) -> Path:
        """Returns the path of a result."""
        return self.base.with_name(f"{self.base.name}.{suffix}")


def url_hash(text: str) -> int:
    """Returns a 64-bit hash of a URL or key.

    For 100 million different URLs, the probability that any two have the same hash is 3 in 10,000.
    """
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def clean_chunk(task: Task) -> dict:
    """Cleans one chunk, unless that has been done before.

    Writes the rows, a hash of each row by which duplicates are found later, and last the counts: that file says that
    the others are complete.

    Returns:
        Counts of `ROW_KINDS`, and under ``captions`` for each column counts of `CAPTION_KINDS`.
    """
    done = load_json(task.file("json"))
    if done is not None:
        return done
    counts = dict.fromkeys(ROW_KINDS, 0)
    captions = {name: dict.fromkeys(CAPTION_KINDS, 0) for name in task.table.columns.captions.values()}
    hashes: list[int] = []
    held = task.rules.schema.empty_table()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with atomic_write(task.file("arrow")) as path, pa.ipc.new_file(path, task.rules.schema, options=options) as out:
        for rows in read_rows(task.table, task.chunk):
            kept, own = _clean_rows(rows, task, counts, captions)
            hashes += own
            held = pa.concat_tables([held, kept])
            while len(held) >= ROW_GROUP:
                out.write(_one_batch(held[:ROW_GROUP]))
                held = held[ROW_GROUP:]
        if len(held) or not hashes:
            out.write(_one_batch(held))
    with atomic_write(task.file("npy")) as path, open(path, "wb") as file:
        np.save(file, np.array(hashes, dtype=np.uint64))
    result = counts | {"captions": captions}
    write_json(task.file("json"), result)
    return result


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [pa.concat_arrays(column.chunks or [pa.array([], column.type)]) for column in table.columns]
    return pa.record_batch(columns, schema=table.schema)


def _clean_rows(rows: Rows, task: Task, counts: dict, captions: dict) -> tuple[pa.Table, list[int]]:
    """Cleans some rows and counts them.

    A row is kept if it has a usable long caption, or any usable caption if the table has no long ones or the rules say
    so.

    Returns:
        The rows to write, and the hash of the URL or key of each.
    """
    columns, rules = task.table.columns, task.rules
    counts["rows"] += len(rows.texts) + rows.num_malformed
    urls, keys = (
        [(text or "").strip() for text in rows.texts[name].to_pylist()] if name else [""] * len(rows.texts)
        for name in (columns.url, columns.key)
    )
    named = np.array([bool(url or key) for url, key in zip(urls, keys)], dtype=bool)
    counts["malformed"] += rows.num_malformed + int((~named).sum())
    fetchable = np.array([not url or is_public(url) for url in urls], dtype=bool)
    counts["bad_url"] += int((named & ~fetchable).sum())
    named &= fetchable
    found = {}
    for source, name in columns.captions.items():
        cleaned = clean_captions(rows.texts[source].filter(named), name != RAW, source in columns.long, rules.trim)
        found[name] = cleaned.mark_repaired(rows.repaired[named])
        for kind, number in found[name].counts().items():
            captions[name][kind] += number
    needed = list(columns.long.values()) if columns.long and not rules.keep_without_long else list(found)
    usable = np.any([found[name].is_text for name in needed], axis=0)
    refused = np.any([cleaned.refused for cleaned in found.values()], axis=0) & ~usable
    counts["kept"] += int(usable.sum())
    counts["refused"] += int(refused.sum())
    counts["empty"] += int((~usable & ~refused).sum())
    places = np.flatnonzero(named)[usable].tolist()
    hashes = [url_hash(urls[place] or keys[place]) for place in places]
    written = {
        URL: pa.array([urls[place] or None for place in places], pa.string()),
        KEY: pa.array([keys[place] or f"{own:016x}" for place, own in zip(places, hashes)], pa.string()),
    } | {name: cleaned.texts.filter(pa.array(usable)) for name, cleaned in found.items()}
    nothing = pa.nulls(len(places), pa.string())
    return pa.table([written.get(name, nothing) for name in rules.schema.names], schema=rules.schema), hashes


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
    try:
        return ip_address(host).is_global
    except ValueError:
        last = host.rpartition(".")[2]
        return last not in _PRIVATE_NAMES and not last[:1].isdigit()  # 127.1 is an address, too


def first_of_each(hash_files: list[Path], per_pass: int = 2_000_000) -> tuple[list[np.ndarray], Counter]:
    """Finds the first row of each hash, over all chunks in order.

    Each pass handles one range of hashes, so that memory doesn't grow with their number.

    Args:
        hash_files: one array of uint64 per chunk.
        per_pass: approximate number of hashes in memory.

    Returns:
        For each chunk a bool array, True for rows to keep; and the number of duplicates.
    """
    sizes = [len(np.load(path)) for path in hash_files]
    keep = [np.zeros(size, dtype=bool) for size in sizes]
    num_passes = max(1, -(-sum(sizes) // per_pass))
    width = -(-(1 << 64) // num_passes)
    for number in range(num_passes):
        low, high = np.uint64(number * width), np.uint64(min((number + 1) * width, 1 << 64) - 1)
        values, places = [], []
        for chunk, path in enumerate(hash_files):
            hashes = np.load(path)
            rows = np.flatnonzero((hashes >= low) & (hashes <= high))
            values.append(hashes[rows])
            places.append((chunk, rows))
        _, first = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *values]), return_index=True)
        is_first = np.zeros(sum(map(len, values)), dtype=bool)
        is_first[first] = True
        start = 0
        for chunk, rows in places:
            keep[chunk][rows] = is_first[start : start + len(rows)]
            start += len(rows)
    return keep, Counter(duplicates=sum(sizes) - sum(int(k.sum()) for k in keep))


def write_part(job: tuple[Path, Path, np.ndarray]) -> int:
    """Writes the rows of a cleaned chunk that are kept.

    Args:
        job: (file of the chunk's rows, file to write, bool [num_rows] that tells which rows to keep).

    Returns:
        Number of rows written. If no row is kept, no file is written.
    """
    source, target, keep = job
    if keep.any() and not target.exists():  # a run that was killed may have written it
        with pa.memory_map(str(source)) as file, atomic_write(target) as path:
            reader = pa.ipc.open_file(file)
            # Captions are all different, so a dictionary would enlarge the file; statistics of their range are useless.
            options = {"compression": "zstd", "use_dictionary": False, "write_statistics": [URL, KEY]}
            with pq.ParquetWriter(path, reader.schema, **options) as out:
                start = 0
                for number in range(reader.num_record_batches):
                    rows = pa.table(reader.get_batch(number))
                    out.write_table(rows.filter(pa.array(keep[start : start + len(rows)])))
                    start += len(rows)
    source.unlink(missing_ok=True)
    return int(keep.sum())


def total_counts(results: list[dict]) -> dict:
    """Adds up the counts of chunks."""
    total: dict = dict.fromkeys(ROW_KINDS, 0)
    for result in results:
        add_counts(total, result)
    return total
