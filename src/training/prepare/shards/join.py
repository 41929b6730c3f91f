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

from training.prepare.rows import as_utf8
from training.prepare.shards.files import JsonSample, Shard, content_mark, plain_tar, read_json_samples, rewrite_shard
from training.prepare.shards.job import ShardJob, attempt
from training.prepare.shards.match import captions_of, find_rows, image_names, open_found, open_tables
from training.prepare.work import format_counts, hash_text, processes, progress
from training.readers.faults import FAULT_KINDS

KINDS = ("samples", "matched", "unmatched", "nothing to match by", *FAULT_KINDS, "captions")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    job = ShardJob(args, args.shards, "--shards", ".join")
    match = args.match or ("key" if args.key_column else None) or _guess_match(job.shards)
    column = args.key_column if match == "key" and args.key_column else match
    tables = open_tables(args.tables, column, args.columns, match == "key", args.caption_lists)
    settings = {"tables": [content_mark(table.path) for table in tables.tables], "match": column}
    settings |= {"columns": tables.columns, "lists": args.caption_lists, "keep": args.keep_existing}
    left = job.left(settings, dict.fromkeys(KINDS, 0))
    found, num_rows, num_malformed = job.state / f"captions-{job.name}.tmp", 0, 0
    try:
        with processes(args.workers) as parallel:
            wanted, jobs = [np.zeros(1, dtype=np.uint64)], []
            looked_at = parallel(attempt, [(_names_in, shard, (match,)) for shard in left])
            for shard, names in progress(looked_at, len(left), "reading", "shard"):
                if isinstance(names, str):
                    job.add(shard, names)
                else:
                    wanted.append(names)
                    jobs.append((_write, shard, (match, found, args.keep_existing)))
            if jobs:
                num_rows, num_malformed = find_rows(tables, np.unique(np.concatenate(wanted)), found)
            for shard, counts in progress(parallel(attempt, jobs), len(jobs), "joining", "shard"):
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
    found = (attempt((_samples_of, shard, ())) for shard in shards)
    samples = next((samples for _, samples in found if not isinstance(samples, str)), [])
    return "url" if any(isinstance(sample.record.get("url"), str) for sample in samples[:100]) else "key"


def _samples_of(shard: Shard) -> list[JsonSample]:
    with plain_tar(shard) as path:
        return read_json_samples(path)


def sample_names(sample: JsonSample, match: str) -> list[str]:
    """Returns what may identify a sample in a table's match column; the first one found there is used."""
    if sample.fault:
        return []
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


def _names_in(shard: Shard, match: str) -> np.ndarray:
    """Returns hashes of the names of a shard's samples."""
    names = (name for sample in _samples_of(shard) for name in sample_names(sample, match))
    return np.array(list(map(hash_text, names)), dtype=np.uint64)


def _write(shard: Shard, match: str, found: Path, keep_existing: bool) -> dict:
    """Writes one shard; returns its counts."""
    counts, additions = Counter(captions=0), []
    with plain_tar(shard) as path, closing(open_found(found)) as base:
        samples = read_json_samples(path)
        for sample in samples:
            names = sample_names(sample, match)
            captions = next((c for c in (captions_of(base, name) for name in names) if c is not None), None)
            nothing = "unmatched" if names else "nothing to match by"
            counts[sample.fault or (nothing if captions is None else "matched")] += 1
            kept = sample.record if keep_existing else {}
            additions.append({key: text for key, text in (captions or {}).items() if not kept.get(key)})
        rewrite_shard(path, shard.target, samples, additions)
    return dict(counts) | {"samples": len(additions), "captions": sum(map(len, additions))}
