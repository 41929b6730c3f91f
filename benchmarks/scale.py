"""The cost of starting and shuffling with 10,000 shards on 512 ranks.

    python -m benchmarks.scale [--shards 10000] [--ranks 512] [--stat-ms 2] [--json FILE]

This needs no images: shards are empty files with the size of 10,000 images and a ``sizes.json`` beside them, and a
sample is represented by its position. Everything else runs as in training: shard names are expanded, checked and
counted, the source is sent to a rank, and loader processes plan their part of an epoch. What a run computes, reads and
sends is told by ``--dry-run``.
"""

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from tabulate import tabulate

from training.data import shards
from training.data.order import Share
from training.data.sizes import count_samples, expand_sources

PER_SHARD, IMAGE_BYTES, WORKERS, BATCH_SIZE, WINDOW = 10_000, 100_000, 8, 32, 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, which prints a table; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--stat-ms", type=float, default=0.0, metavar="X", help="delay each file access by X ms (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args(argv)
    content = measure_start(args.shards, args.ranks, args.stat_ms)
    rows = [
        (name, f"{n:,}" if isinstance(n, int) else f"{n:,.3g}" if isinstance(n, float) else n)
        for name, n in content.items()
    ]
    print("\n" + tabulate(rows, tablefmt="github", disable_numparse=True))
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def measure_start(num_shards: int, num_ranks: int, stat_ms: float = 0.0) -> dict[str, object]:
    """Measures everything between the command and the first batch, except reading samples and building a model."""
    with tempfile.TemporaryDirectory() as folder:
        spec = write_shards(Path(folder), num_shards)
        with patch.object(os, "stat", slowed(os.stat, stat_ms / 1000)):
            urls, listing_s = timed(lambda: expand_sources(spec)[0])
            sizes, counting_s = timed(lambda: count_samples(urls))
        source = shards.ShardSource(urls, sizes, seed=0, window=WINDOW)
    sent, pickle_s = timed(lambda: pickle.dumps(source))
    firsts, lanes, peak = [], [], 0
    tracemalloc.start()
    received, unpickle_s = timed(lambda: pickle.loads(sent))
    held = tracemalloc.get_traced_memory()[0]
    with patch.object(shards, "read_exactly", places):
        first_samples(received, 0, num_ranks, worker=0)  # warm-up: allocations made once per process are not counted
        for rank in range(0, num_ranks, max(1, num_ranks // 32)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            samples, first_s = timed(lambda: first_samples(received, rank, num_ranks, worker=rank % WORKERS))
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
            firsts.append(first_s)
            lanes.append(len({shard for shard, _ in samples}))
    tracemalloc.stop()
    return {
        "shards": num_shards,
        "samples": source.num_samples,
        "delay of each file access, ms": stat_ms,
        "ranks x loader processes": f"{num_ranks} x {WORKERS}",
        "rank 0: list and check shards, s": listing_s,
        "rank 0: count samples from sizes.json, s": counting_s,
        "index sent to each rank, bytes": len(sent),
        "pack and unpack the index, s": pickle_s + unpickle_s,
        "loader process: plan the first window, slowest, s": max(firsts),
        "index in each rank, bytes": held,
        "loader process: additional memory while planning, bytes": peak,
        "shards in a loader process's first window": f"{min(lanes)} to {max(lanes)}",
        "sum up to the first read, s": listing_s + counting_s + pickle_s + unpickle_s + max(firsts),
    }


def slowed(function: Callable, seconds: float) -> Callable:
    """Returns a function that takes longer by `seconds`, as on a network file system."""

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow if seconds else function


def write_shards(folder: Path, count: int) -> str:
    """Makes sparse files of a shard's size, and their ``sizes.json``; returns their brace pattern."""
    for number in range(count):
        path = folder / f"{number:05d}.tar"
        path.touch()
        os.truncate(path, PER_SHARD * IMAGE_BYTES)
    (folder / "sizes.json").write_text(json.dumps({f"{n:05d}.tar": PER_SHARD for n in range(count)}))
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def places(url: str, first: int, stop: int, *_: object) -> Iterator[tuple[str, int]]:
    """Replaces reading: yields the position of each sample."""
    return ((url, number) for number in range(first, stop))


def first_samples(source: shards.ShardSource, rank: int, num_ranks: int, worker: int) -> list[tuple[str, int]]:
    """Returns the positions of the samples in a loader process's first window."""
    share = Share(BATCH_SIZE, source.num_samples // (BATCH_SIZE * num_ranks), rank, num_ranks)
    (span,), _ = share.of_worker(worker, WORKERS)
    reading = source.read(0, span.start, span.stop)
    return [sample for sample, _ in zip(reading, range(WINDOW))]


def timed(work: Callable) -> tuple[object, float]:
    """Calls a function; returns (its result, seconds)."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
