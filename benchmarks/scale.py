"""The cost of starting and shuffling with 10,000 shards on 512 ranks, and of a run on 100M images x 10 epochs.

    python -m benchmarks.scale [--shards 10000] [--ranks 512] [--stat-ms 2] [--json FILE]

This needs no images: shards are empty files with the size of 10,000 images and a ``sizes.json`` beside them, and a
sample is represented by its position. Everything else runs as in training: shard names are expanded, checked and
counted, the source is sent to a rank, and loader processes plan their part of an epoch. The cost of a run is not
measured, but calculated from the model's FLOPs and from published caption lengths.
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

import torch
from tabulate import tabulate

import training
from benchmarks.measure import CONTEXT_LENGTH, LONG_TOKENS, RAW_TOKENS
from training.data import shards
from training.data.position import Share
from training.data.sizes import count_samples, expand_sources
from training.train.flops import PEAKS, count_flops

PER_SHARD, IMAGE_BYTES, WORKERS, BATCH_SIZE, WINDOW = 10_000, 100_000, 8, 32, 1000
MODEL, EPOCHS, NUM_LONG = "lotlip_bert-ViT-B-16", 10, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, which prints two tables; returns 0."""
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
    content = {
        "measured on this machine": measure_start(args.shards, args.ranks, args.stat_ms),
        "calculated": count_run(args.shards * PER_SHARD, args.ranks),
    }
    for title, numbers in content.items():
        rows = [
            (name, f"{n:,}" if isinstance(n, int) else f"{n:,.3g}" if isinstance(n, float) else n)
            for name, n in numbers.items()
        ]
        print(f"\n{title}\n" + tabulate(rows, tablefmt="github", disable_numparse=True))
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


def count_run(num_images: int, num_ranks: int) -> dict[str, object]:
    """Calculates how much a run computes, reads and sends."""
    model = training.create_model(MODEL, pretrained_text=False).eval()
    model.lock_image_tower()
    ids = torch.randint(1000, 2000, (1, CONTEXT_LENGTH))
    per_image, per_token = count_flops(model, (224, 224), ids)
    tokens = RAW_TOKENS + NUM_LONG * LONG_TOKENS
    text, seen = tokens * per_token, EPOCHS * num_images
    batch = BATCH_SIZE * num_ranks
    hours = {name: seen * flops / 0.4 / PEAKS["H100"] / 3600 for name, flops in (("images", per_image), ("text", text))}
    features = batch * (1 + (1 + NUM_LONG) * 3) * 512 * 4
    return {
        "model": f"{MODEL}, image tower locked, {NUM_LONG} long captions, {tokens} tokens per image",
        "images seen": seen,
        "steps": seen // batch,
        "images per step": batch,
        "GFLOPs per image: image tower, forward": per_image / 1e9,
        "GFLOPs per image: text tower, forward and backward": text / 1e9,
        "H100 hours at 40% of the peak, image tower": hours["images"],
        "H100 hours at 40% of the peak, text tower": hours["text"],
        "hours on all ranks": sum(hours.values()) / num_ranks,
        "images to read and decode per second": round(seen / sum(hours.values()) * num_ranks / 3600),
        "hours on all ranks with cached image features": hours["text"] / num_ranks,
        "TB read per epoch, at 100 kB per image": num_images * IMAGE_BYTES / 1e12,
        "TB of cached image features": num_images * 768 * 2 / 1e12,
        "MB of features gathered into each rank per step": features / 1e6,
        "GB of a checkpoint": checkpoint_bytes(model) / 1e9,
        "GB read on all ranks for the first windows, at most": num_ranks * WORKERS * WINDOW * IMAGE_BYTES / 1e9,
    }


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of all weights, and of two optimizer moments for each trained weight."""
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())


def timed(work: Callable) -> tuple[object, float]:
    """Calls a function; returns (its result, seconds)."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
