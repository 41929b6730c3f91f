"""`prepare join`: adds captions from tables to the JSON files of existing shards.

A pass reads the URLs (or keys) of some shards, looks up their rows in the tables, and rewrites the shards, several in
parallel. A note beside each written shard says that it is done, so that the same command can continue after a stop.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from training.data.faults import FAULT_KINDS
from training.prepare.shards.files import (
    JsonSample,
    Place,
    check_sources,
    fingerprint,
    finish,
    my_places,
    not_done,
    read_json_samples,
    rewrite_shard,
    write_note,
)
from training.prepare.shards.match import CaptionTables, find_rows, image_names, make_index, open_tables
from training.prepare.work import add_counts, format_counts, processes, progress, spread

STATE = ".join"
KINDS = ("samples", "matched", "unmatched", "nothing to match by", *FAULT_KINDS, "captions")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    everything, mine = my_places(args, args.shards, "--shards", STATE)
    match = args.match or ("key" if args.key_column else None) or _guess_match([place.source for place in everything])
    column = args.key_column if match == "key" and args.key_column else match
    tables = open_tables(args.tables, column, args.columns, everything[0].state / "index", match == "key")
    check_sources(args, everything, tables.paths)
    mark = fingerprint(tables.describe() | {"keep": args.keep_existing})
    total: dict = dict.fromkeys(KINDS, 0)
    left = not_done(mine, mark, total)
    broken: dict[str, str] = {}
    with processes(args.workers) as pool:
        if left:
            jobs = [(tables, number) for number in range(len(tables.paths))]
            for _ in progress(spread(make_index, jobs, pool), len(jobs), "indexing", "table"):
                pass
        work = _jobs(left, tables, mark, args, pool, broken)
        for place, counts, fault in progress(spread(_write, work, pool), len(left), "joining", "shard"):
            add_counts(total, counts)
            if fault:
                broken[str(place.source)] = fault
    summary = {"shards": len(mine), "done_before": len(mine) - len(left), "broken_shards": broken} | total
    summary |= {"match": match, "columns": list(tables.columns), "table_rows": tables.num_rows}
    lines = [
        f"{total['samples']:,} samples by {match}: {format_counts({k: total[k] for k in KINDS[1:-1]})}",
        f"{total['captions']:,} captions written from {tables.num_rows:,} rows",
    ]
    return finish(args, everything, summary, lines)


def _guess_match(shards: list[Path]) -> str:
    """Returns ``url`` if samples of the first readable shard have such a key, else ``key``."""
    for path in shards:
        try:
            samples = read_json_samples(path)
        except OSError:
            continue
        return "url" if any(isinstance(s.record.get("url"), str) for s in samples[:100]) else "key"
    return "key"


def sample_values(sample: JsonSample, match: str) -> list[str]:
    """Returns the values that may identify a sample in a table's match column; the first one found there is used."""
    value = sample.record.get(match)
    values = [value.strip()] if isinstance(value, str) and value.strip() else []
    if match == "url":
        return values
    key = sample.key.removeprefix("./")
    return [key, key.rpartition("/")[2] if "/" in key else f"*/{key}", *(image_names(v)[0] for v in values)]


def _read(job: tuple[Place, str]) -> tuple[Place, list[list[str]] | None, list[str | None], str | None]:
    """Returns (place, values of each sample or None, fault of each sample, why the shard can't be read)."""
    place, match = job
    try:
        samples = read_json_samples(place.source)
    except OSError as error:
        return place, None, [], str(error)
    return place, [[] if s.fault else sample_values(s, match) for s in samples], [s.fault for s in samples], None


def _jobs(left: list[Place], tables: CaptionTables, mark: str, args, pool, broken: dict[str, str]) -> Iterator[tuple]:
    """Yields the argument of `_write` for each shard; looks up rows for `--samples-per-pass` samples at a time."""
    held: list[tuple] = []

    def found() -> Iterator[tuple]:
        rows, table = find_rows(tables, {v for _, samples, _ in held for values in samples for v in values})
        for place, samples, faults in held:
            chosen = [next((rows[v] for v in values if v in rows), None) for values in samples]
            captions = table.take(pa.array([row for row in chosen if row is not None], pa.int64()))
            kinds = [_kind(f, values, row) for f, values, row in zip(faults, samples, chosen)]
            yield place, kinds, captions.combine_chunks(), mark, args.keep_existing
        held.clear()

    # Read a few shards at a time, so that a pass exceeds its number of samples by no more than these.
    for start in range(0, len(left), args.workers):
        some = [(place, "key" if tables.by_name else "url") for place in left[start : start + args.workers]]
        for place, samples, faults, fault in sorted(spread(_read, some, pool), key=lambda r: str(r[0].source)):
            if fault:
                broken[str(place.source)] = fault
            else:
                held.append((place, samples, faults))
        if sum(len(samples) for _, samples, _ in held) >= args.samples_per_pass:
            yield from found()
    if held:
        yield from found()


def _kind(fault: str | None, values: list[str], row: int | None) -> str:
    if fault:
        return fault
    if not values:
        return "nothing to match by"
    return "unmatched" if row is None else "matched"


def _write(job: tuple) -> tuple[Place, dict, str | None]:
    """Writes one shard; returns (place, counts, why it can't be written)."""
    place, kinds, captions, mark, keep_existing = job
    rows = iter(captions.to_pylist())
    matched = [next(rows) if kind == "matched" else {} for kind in kinds]
    additions = [{name: text for name, text in row.items() if text} for row in matched]
    counts = {"samples": len(kinds)} | {kind: kinds.count(kind) for kind in set(kinds)}
    try:
        if keep_existing:
            there = [sample.record for sample in read_json_samples(place.source)]
            additions = [{k: v for k, v in new.items() if not old.get(k)} for new, old in zip(additions, there)]
        rewrite_shard(place.source, place.target, additions)
    except OSError as error:
        return place, {}, str(error)
    counts["captions"] = sum(map(len, additions))
    write_note(place, mark, counts)
    return place, counts, None
