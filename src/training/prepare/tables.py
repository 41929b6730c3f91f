"""`prepare tables`: converts published caption tables to clean Parquet parts, all with the same columns.

This process reads the tables once; worker processes clean the rows of one part each and write it. Then duplicates are
found by hashes of the URLs, over all parts in order, and removed. Parts that are complete on disk are not made again.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from ipaddress import ip_address
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tabulate import tabulate

from training.prepare import work
from training.prepare.clean import clean_caption
from training.prepare.columns import KEY, RAW, URL, Columns, cell_name, cell_texts, find_columns, open_large
from training.readers.columnar import Row
from training.readers.table_files import local_spec, table_files
from training.readers.tables import TableFile
from training.runtime.files import atomic_write

VERSION = 2  # version of the cleaning; parts of different versions are never mixed
_PRIVATE_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp")
_COUNTS = b"counts"  # in the metadata of a part
ROW_KINDS = ("rows", "kept", "duplicates", "empty", "refused", "malformed", "bad_url")
CAPTION_KINDS = ("kept", "empty", "refused", "repaired", "cut_off")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0.

    Raises:
        FileNotFoundError, ValueError: a table is missing, not a table or lacks columns, or --out holds something else.
    """
    started, out = time.monotonic(), Path(args.out)
    paths = table_files(local_spec("::".join(args.tables)))
    tables = [open_large(path, args.csv_separator, plain_quotes=args.no_quotes) for path in paths]
    columns = [find_columns(str(table.path), table.names, args) for table in tables]
    # In the order raw, long, short; columns that a table lacks are null.
    captions = [
        *[RAW for found in columns if found.raw],
        *[name for found in columns for name in found.long.values()],
        *[name for found in columns for name in found.short.values()],
    ]
    rules = {"captions": list(dict.fromkeys(captions)), "trim": not args.keep_cut_off}
    rules |= {"keep_without_long": args.keep_without_long, "lists": args.caption_lists}
    sources = [
        {"name": table.path.name, "bytes": table.path.stat().st_size, "form": getattr(table, "form", None)}
        | asdict(found)
        for table, found in zip(tables, columns)
    ]
    work.start_folder(
        args, ".work", {"version": VERSION, "tables": sources, "rows_per_part": args.rows_per_part} | rules
    )
    if summary := work.load_json(out / work.SUMMARY):
        print(f"{out}: already complete")
    else:
        summary = _make(zip(tables, columns), rules, args)
        work.write_json(out / work.SUMMARY, summary)
    work.write_summary(args, summary)
    seconds = time.monotonic() - started
    rows = [[name, *counts.values()] for name, counts in summary["captions"].items()]
    headers = ["captions", *(kind.replace("_", "-") for kind in CAPTION_KINDS)]
    print(
        f"{summary['kept']:,} of {summary['rows']:,} rows kept in {summary['parts']:,} parts\n"
        f"dropped rows: {work.format_counts({name: summary[name] for name in ROW_KINDS[2:]})}\n"
        f"{tabulate(rows, headers, intfmt=',')}\n{seconds:.1f} s, {summary['rows'] / seconds:,.0f} rows/s"
    )
    return 0


def _make(tables: Iterable[tuple[TableFile, Columns]], rules: dict, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the parts; returns counts of rows and captions."""
    paths: list[Path] = []

    def tasks() -> Iterator[tuple]:
        for number, (table, columns) in enumerate(tables):
            rows = table.stream(columns.wanted)
            for part in count():
                if not (some := list(islice(rows, args.rows_per_part))):
                    break
                paths.append(Path(args.out) / f"part-{number:03d}-{part:06d}.parquet")
                if not paths[-1].exists():
                    yield some, columns, paths[-1]

    with work.processes(args.workers) as parallel:
        for _ in parallel(partial(clean_part, **rules), tasks(), None, "cleaning", "part"):
            pass
        counts = [json.loads(pq.read_schema(path).metadata[_COUNTS]) for path in paths]
        keep = first_of_each(paths)
        jobs = [(path, rows) for path, rows in zip(paths, keep) if not rows.all() or not len(rows)]
        for _ in parallel(_drop_rows, jobs, len(jobs), "removing duplicates", "part"):
            pass
    summary: dict = dict.fromkeys(ROW_KINDS, 0) | {"captions": {}}
    for of_part in counts:
        work.add_counts(summary, of_part)
    kept = sum(int(rows.sum()) for rows in keep)
    return summary | {"kept": kept, "duplicates": summary["kept"] - kept, "parts": sum(map(bool, map(np.any, keep)))}


def first_of_each(paths: list[Path]) -> list[np.ndarray]:
    """Finds the first row of each URL, or key without one, over all parts in order.

    Rows are compared by 64-bit hashes: for 100 million different URLs, the probability that any two have the same one
    is 3 in 10,000. Each row takes about 30 bytes of memory.

    Returns:
        For each part a bool array, True for rows to keep.
    """
    hashes = [np.zeros(0, dtype=np.uint64)]
    for path in paths:
        names = pc.coalesce(*pq.read_table(path, columns=[URL, KEY]).columns).to_numpy()
        hashes.append(pd.util.hash_array(names, categorize=False))
    keep = ~pd.Series(np.concatenate(hashes)).duplicated().to_numpy()
    return np.split(keep, np.cumsum([len(rows) for rows in hashes]))[1:-1]


def clean_part(
    task: tuple[list[Row], Columns, Path], captions: list[str], trim: bool, keep_without_long: bool, lists: str
) -> None:
    """Writes the good rows of a part, and counts of `ROW_KINDS`, and by column of `CAPTION_KINDS`, as metadata.

    A row is kept if it has a usable long caption, or any usable caption if the table has no long ones or the rules say
    so.

    Args:
        task: rows, with the cells of `columns.wanted`; the columns; and the file to write.
        captions: caption columns to write, in order; columns that a table lacks are null.
        trim: remove incomplete last sentences.
        keep_without_long: keep rows without a usable long caption.
        lists: see `caption_texts`.

    Raises:
        ValueError: a cell holds several alternatives, but a part has one caption in each column.
    """
    rows, columns, target = task
    kinds, good, names = Counter(rows=len(rows)), [], columns.wanted
    for cells, repaired in rows:
        row = dict(zip(names, cells or ()))
        url, key = (cell_name(row.get(name or "")) for name in (columns.url, columns.key))
        if (not url and not key) or (url and not is_public(url)):
            kinds["bad_url" if url else "malformed"] += 1
        else:
            good.append((row, repaired, url or None, key or f"{work.hash_text(url):016x}"))
    cleaned, counts = {}, {}
    for source, name in columns.captions.items():
        how = {"generated": name != RAW, "long": source in columns.long, "trim": trim}
        found = [clean_caption(_one_text(row[source], lists), **how) for row, *_ in good]
        cleaned[name] = found
        counts[name] = dict.fromkeys(CAPTION_KINDS, 0) | Counter(c.fault or "kept" for c in found)
        counts[name]["repaired"] = sum(c.repaired or row[1] and not c.fault for c, row in zip(found, good))
        counts[name]["cut_off"] = sum(c.cut_off for c in found)
    needed = columns.long.values() if columns.long and not keep_without_long else cleaned
    keep = [any(c.text for c in of_row) for of_row in zip(*(cleaned[name] for name in needed))]
    for is_kept, of_row in zip(keep, zip(*cleaned.values())):
        kinds["kept" if is_kept else "refused" if any(c.fault == "refused" for c in of_row) else "empty"] += 1
    content: dict = dict(zip((URL, KEY), zip(*(row[2:] for row in good)))) if good else {}
    content |= {name: [c.text for c in found] for name, found in cleaned.items()}
    note = {_COUNTS: json.dumps(dict.fromkeys(ROW_KINDS, 0) | kinds | {"captions": counts})}
    schema = pa.schema([(name, pa.string()) for name in (URL, KEY, *captions)], note)
    arrays = [pa.array(content.get(name, [None] * len(good)), pa.string()) for name in schema.names]
    _write(pa.Table.from_arrays(arrays, schema=schema).filter(pa.array(keep, pa.bool_())), target)


def _one_text(cell: object, lists: str) -> str | None:
    if isinstance(cell, str) and cell.isascii() and cell[:1] != "[":  # nearly all
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
        if parts.scheme.lower() not in ("http", "https") or not host:
            return False
        last = host.rpartition(".")[2]
        if not last[:1].isdigit() and ":" not in host:  # a name
            return last not in _PRIVATE_NAMES
        return ip_address(host).is_global
    except ValueError:
        return False  # 127.1 is an address, too


def _drop_rows(job: tuple[Path, np.ndarray]) -> None:
    """Removes the rows of a part that its bool array doesn't keep, and the part if none is left."""
    path, keep = job
    if keep.any():
        _write(pq.read_table(path).filter(pa.array(keep)), path)
    else:
        path.unlink()


def _write(rows: pa.Table, target: Path) -> None:
    with atomic_write(target) as path:
        # Captions are all different, so a dictionary would enlarge the file; statistics of their range are useless.
        pq.write_table(rows, path, compression="zstd", use_dictionary=False, write_statistics=[URL, KEY])
