"""`prepare join`: adds captions from tables to the JSON files of existing shards.

The names or URLs of all samples are read, then the tables once: the captions of each shard go to a file of its own, as
those of all shards may not fit into memory. Then each shard is rewritten, several in parallel. A note beside each
written shard says that it is done, so that the same command can continue after a stop.
"""

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from training.prepare.columns import KEY, URL, as_utf8, cell_name, cell_texts, open_large
from training.prepare.job import ShardJob
from training.prepare.shards import Shard, content_mark, plain_tar, read_json_samples, rewrite_shard
from training.prepare.work import format_counts, hash_text, processes, progress
from training.readers.columnar import ColumnarFile, may_hold_text
from training.readers.faults import FAULT_KINDS
from training.readers.files import IMAGE_SUFFIXES
from training.readers.samples import RawSample
from training.readers.table_files import local_spec, table_files
from training.readers.tables import TableFile

ROWS_AT_ONCE = 10_000
MAX_WAITING = 1 << 26  # characters of captions in memory, before they are written to the files of their shards
# Text columns that are never captions.
NOT_CAPTIONS = (URL, KEY, "status", "error_message", "exif", "sha256", "md5", "url_hash")
Found = tuple[list[str], dict] | None  # (names, caption column -> cell) of a row; None if it can't be read
KINDS = ("samples", "matched", "unmatched", "nothing to match by", *FAULT_KINDS, "captions")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    job = ShardJob(args, args.shards, "--shards", ".join")
    match = args.match or ("key" if args.key_column else None) or _guess_match(job.shards)
    match_column = args.key_column if match == "key" and args.key_column else match
    tables, columns = open_tables(args.tables, match_column, args.columns)
    settings = {"tables": [content_mark(table.path) for table in tables], "match": match_column, "columns": columns}
    left = job.left(settings | {"lists": args.caption_lists, "keep": args.keep_existing}, dict.fromkeys(KINDS, 0))
    folder, num_rows, num_malformed = job.state / f"captions-{job.name}", 0, 0
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        with processes(args.workers) as parallel:
            names = dict(job.each(parallel, partial(_names_in, match=match), left, "reading"))
            if names:
                batches = _batches(tables, match, match_column, columns)
                num_rows, num_malformed = divide_rows(batches, args.caption_lists, names, folder)
            write = partial(_write, match=match, folder=folder, keep_existing=args.keep_existing)
            job.write(parallel, write, list(names), "joining")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total, further = job.total, {"match": match, "columns": columns, "table_rows": num_rows}
    malformed = f" ({num_malformed:,} of them malformed)" if num_malformed else ""
    lines = [
        f"{total['samples']:,} samples by {match}: {format_counts({k: total[k] for k in KINDS[1:-1]})}",
        f"{total['captions']:,} captions written; {num_rows:,} rows of tables read{malformed}",
    ]
    return job.finish(further | {"malformed_rows": num_malformed}, lines)


def _guess_match(shards: Sequence[Shard]) -> str:
    """Returns ``url`` if samples of the first readable shard have such a key, else ``key``."""
    for shard in shards:
        try:
            records = [sample.record for sample in _samples_of(shard)[:100]]
        except OSError:  # reported when it is its turn
            continue
        return "url" if any(isinstance(record.get("url"), str) for record in records) else "key"
    return "key"


def _samples_of(shard: Shard) -> list[RawSample]:
    with plain_tar(shard) as path:
        return read_json_samples(path)


def sample_names(sample: RawSample, match: str) -> list[str]:
    """Returns what may identify a sample in a table's match column; the first one found there is used."""
    if sample.fault:
        return []
    value = sample.record.get(match)
    name = as_utf8(value.strip()) if isinstance(value, str) else ""
    if match == "url":
        return [name] if name else []
    key = sample.key.removeprefix("./")
    return [key, key.rpartition("/")[2] if "/" in key else f"*/{key}", *image_names(name)[:1]]


def _names_in(shard: Shard, match: str) -> np.ndarray:
    """Returns hashes of the names of a shard's samples."""
    names = {name for sample in _samples_of(shard) for name in sample_names(sample, match)}
    return np.array(list(map(hash_text, names)), dtype=np.uint64)


def _write(shard: Shard, match: str, folder: Path, keep_existing: bool) -> dict:
    """Writes one shard; returns its counts."""
    counts, additions, found = Counter(captions=0), [], read_captions(_captions_file(folder, shard))
    with plain_tar(shard) as path:
        samples = read_json_samples(path)
        for sample in samples:
            names = sample_names(sample, match)
            captions = next((found[name] for name in names if found.get(name) is not None), None)
            nothing = "unmatched" if names else "nothing to match by"
            counts[sample.fault or (nothing if captions is None else "matched")] += 1
            kept = sample.record if keep_existing else {}
            additions.append({key: text for key, text in (captions or {}).items() if not kept.get(key)})
        rewrite_shard(path, shard.target, samples, additions)
    return dict(counts) | {"samples": len(additions), "captions": sum(map(len, additions))}


def open_tables(
    names: Sequence[str], match_column: str, columns: Sequence[str] | None
) -> tuple[list[TableFile], list[str]]:
    """Opens caption tables.

    Args:
        names: see `table_files`.
        match_column: the column that identifies the sample of a row.
        columns: the caption columns to use; None means all columns of text.

    Returns:
        The tables in order, and the caption columns to use.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not a table, or lacks one of the columns.
    """
    tables = [open_large(path) for path in table_files(local_spec("::".join(names)))]
    for table in tables:
        if missing := next((name for name in (match_column, *(columns or ())) if name not in table.names), None):
            raise ValueError(
                f"{table.path}: no column {missing}; it has {', '.join(table.names)} (--match, --key-column, --columns)"
            )
    found: dict[str, None] = {}
    for table in tables:
        texts = (
            [f.name for f in table.schema if may_hold_text(f.type)] if isinstance(table, ColumnarFile) else table.names
        )
        found |= dict.fromkeys(texts)
    chosen = list(columns or (name for name in found if name not in (*NOT_CAPTIONS, match_column)))
    if not chosen:
        raise ValueError(f"{tables[0].path}: no columns of text beside {match_column}; name them with --columns")
    return tables, chosen


def image_names(name: str) -> list[str]:
    r"""Returns what identifies an image in a table, without its suffix: ``photos\1.jpg`` -> ``photos/1``, ``*/1``.

    The last one matches a sample in no folder, such as ``1`` in a tar of the folder's content.
    """
    name = name.strip().replace("\\", "/").removeprefix("./")
    stem, stop, suffix = name.rpartition(".")
    whole = stem if stop and suffix.lower() in IMAGE_SUFFIXES else name
    return [whole, f"*/{whole.rpartition('/')[2]}"] if "/" in whole else [whole] if whole else []


def _batches(
    tables: Sequence[TableFile], match: str, match_column: str, columns: Sequence[str]
) -> Iterator[list[Found]]:
    """Yields a few rows at a time."""
    for table in tables:
        present = [name for name in columns if name in table.names]
        rows = table.stream([match_column, *present])
        while some := list(islice(rows, ROWS_AT_ONCE)):
            batch: list[Found] = []
            for cells, _ in some:
                name = cell_name(cells[0]) if cells else ""
                names = image_names(name) if match == "key" else [name] if name else []
                batch.append((names, dict(zip(present, cells[1:]))) if cells else None)
            yield batch


def divide_rows(
    batches: Iterator[list[Found]], lists: str, names: Mapping[Shard, np.ndarray], folder: Path
) -> tuple[int, int]:
    """Writes the rows of tables that belong to samples to one file per shard, for `read_captions`.

    Args:
        batches: see `_batches`.
        lists: see `caption_texts`.
        names: shard -> hashes of the names of its samples.
        folder: a new folder for the files.

    Returns:
        Number of rows, and how many of them can't be read.
    """
    folder.mkdir(parents=True)
    hashes = np.concatenate(list(names.values()))
    shards = np.repeat(np.arange(len(names), dtype=np.int32), list(map(len, names.values())))
    order = np.argsort(hashes)
    hashes, shards = hashes[order], shards[order]
    files = [_captions_file(folder, shard) for shard in names]
    waiting: dict[Path, list[str]] = defaultdict(list)
    num_rows = num_malformed = size = 0
    for batch in progress(batches, None, "reading tables", "batch"):
        num_rows, num_malformed = num_rows + len(batch), num_malformed + batch.count(None)
        found = [(name, row) for row in batch if row for name in row[0]]
        wanted = np.array([hash_text(name) for name, _ in found], dtype=np.uint64)
        first, end = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
        for index in np.flatnonzero(first < end):
            name, (all_names, cells) = found[index]
            texts = {column: cell_texts(cell, lists) for column, cell in cells.items()}
            captions = {column: t if len(t) > 1 else t[0] for column, t in texts.items() if t}
            line = json.dumps([name, all_names[0], captions]) + "\n"
            for shard in shards[first[index] : end[index]]:
                waiting[files[shard]].append(line)
                size += len(line)
        if size > MAX_WAITING:
            _append(waiting)
            size = 0
    _append(waiting)
    return num_rows, num_malformed


def _captions_file(folder: Path, shard: Shard) -> Path:
    return folder / f"{hash_text(str(shard.target)):016x}.jsonl"


def _append(waiting: dict[Path, list[str]]) -> None:
    for path, lines in waiting.items():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)
    waiting.clear()


def read_captions(path: Path) -> dict[str, dict[str, str | list[str]] | None]:
    """Reads a file of `divide_rows`.

    Returns:
        Name -> captions of the first row with this name; None if it stands for images of several folders, as ``*/1``
        may.
    """
    found: dict[str, tuple[str, dict | None]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, whole_name, captions = json.loads(line)
        if found.setdefault(name, (whole_name, captions))[0] != whole_name:
            found[name] = whole_name, None
    return {name: captions for name, (_, captions) in found.items()}
