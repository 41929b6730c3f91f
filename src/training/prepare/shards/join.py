"""`prepare join`: adds captions from tables to the JSON files of existing shards.

The names or URLs of all samples are read, then the tables once; then each shard is rewritten, several in parallel. A
note beside each written shard says that it is done, so that the same command can continue after a stop.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from training.data.faults import FAULT_KINDS
from training.prepare.rows import as_utf8
from training.prepare.shards.files import JsonSample, Shard, plain_tar, read_json_samples, rewrite_shard
from training.prepare.shards.job import ShardJob
from training.prepare.shards.match import captions_of, find_rows, image_names, open_found, open_tables
from training.prepare.work import format_counts, hash_text, processes, progress

KINDS = ("samples", "matched", "unmatched", "nothing to match by", *FAULT_KINDS, "captions")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    job = ShardJob(args, args.shards, "--shards", ".join")
    match = args.match or ("key" if args.key_column else None) or _guess_match(job.shards)
    column = args.key_column if match == "key" and args.key_column else match
    tables = open_tables(args.tables, column, args.columns, match == "key", args.caption_lists)
    paths = [table.path for table in tables.tables]
    settings = {"tables": [[path.name, path.stat().st_size] for path in paths], "match": column}
    settings |= {"columns": tables.columns, "lists": args.caption_lists, "keep": args.keep_existing}
    left = job.left(settings, dict.fromkeys(KINDS, 0), paths)
    found, num_rows, num_malformed = job.state / f"captions-{job.name}.tmp", 0, 0
    try:
        with processes(args.workers) as parallel:
            wanted, jobs = [np.zeros(1, dtype=np.uint64)], []
            looked_at = parallel(_names_in, [(shard, match) for shard in left])
            for shard, names in progress(looked_at, len(left), "reading", "shard"):
                if isinstance(names, str):
                    job.add(shard, names)
                else:
                    wanted.append(names)
                    jobs.append((shard, match, found, args.keep_existing))
            if jobs:
                num_rows, num_malformed = find_rows(tables, np.unique(np.concatenate(wanted)), found)
            for shard, counts in progress(parallel(_write, jobs), len(jobs), "joining", "shard"):
                job.add(shard, counts)
    finally:
        found.unlink(missing_ok=True)
    total, further = job.total, {"match": match, "columns": list(tables.columns), "table_rows": num_rows}
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
            with plain_tar(shard) as path:
                samples = read_json_samples(path)
        except OSError:
            continue
        return "url" if any(isinstance(s.record.get("url"), str) for s in samples[:100]) else "key"
    return "key"


def sample_names(sample: JsonSample, match: str) -> list[str]:
    """Returns what may identify a sample in a table's match column; the first one found there is used."""
    value = sample.record.get(match)
    values = [as_utf8(value.strip())] if isinstance(value, str) and value.strip() else []
    if match == "url":
        return values
    key = sample.key.removeprefix("./")
    return [
        key,
        key.rpartition("/")[2] if "/" in key else f"*/{key}",
        *(name for v in values for name in image_names(v)[:1]),
    ]


def _names_in(job: tuple[Shard, str]) -> tuple[Shard, np.ndarray | str]:
    """Returns (shard, hashes of the names of its samples, or why it can't be read)."""
    shard, match = job
    try:
        with plain_tar(shard) as path:
            samples = read_json_samples(path)
    except OSError as error:
        return shard, str(error)
    names = [name for sample in samples if not sample.fault for name in sample_names(sample, match)]
    return shard, np.array([hash_text(name) for name in names], dtype=np.uint64)


def _write(job: tuple[Shard, str, Path, bool]) -> tuple[Shard, dict | str]:
    """Writes one shard; returns (shard, its counts, or why it can't be written)."""
    shard, match, found, keep_existing = job
    counts, additions = Counter(captions=0), []
    try:
        with plain_tar(shard) as path, closing(open_found(found)) as base:
            for sample in read_json_samples(path):
                names = [] if sample.fault else sample_names(sample, match)
                captions = next((c for c in (captions_of(base, name) for name in names) if c is not None), None)
                nothing = "unmatched" if names else "nothing to match by"
                counts[sample.fault or (nothing if captions is None else "matched")] += 1
                kept = sample.record if keep_existing else {}
                additions.append({key: text for key, text in (captions or {}).items() if not kept.get(key)})
            rewrite_shard(path, shard.target, additions)
    except OSError as error:
        return shard, str(error)
    return shard, dict(counts) | {"samples": len(additions), "captions": sum(map(len, additions))}
