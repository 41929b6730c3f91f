"""Ranks of N images x N captions: ours, the whole in float64, CLIP_benchmark's recall, and the float32 product alone.

    python -m benchmarks.ranking [--pairs 10000] [--dim 512] [--noise 3] [--device cpu] [--json FILE]

Sides run in processes of their own and take turns. Seconds are of processor time on a CPU, so that other work on the
machine counts little, and of the clock on a GPU. Features are random; a caption is its image's feature with noise of
`--noise` times its norm. R@1 of all sides is compared.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn.functional import normalize

from training.eval.metrics import TIE_TOLERANCE, count_ranks, hit_probability

BLOCK = 4096


def ours(images: torch.Tensor, texts: torch.Tensor, device: str) -> tuple[float, float]:
    """Returns R@1 of both directions by `metrics.count_ranks`."""
    counts = count_ranks(images, texts, torch.arange(len(images)), device=device)
    return tuple(float(hit_probability(c, 1).mean()) for c in counts)


def float64(images: torch.Tensor, texts: torch.Tensor, device: str) -> tuple[float, float]:
    """Returns R@1, with all scores computed and compared in float64."""
    images, texts = images.to(device, torch.float64), texts.to(device, torch.float64)
    target = (images * texts).sum(1)
    better = torch.zeros(2, len(images), dtype=torch.int64, device=device)
    for i in range(0, len(images), BLOCK):
        for t in range(0, len(texts), BLOCK):
            score = images[i : i + BLOCK] @ texts[t : t + BLOCK].T
            better[0, i : i + BLOCK] += (score > target[i : i + BLOCK, None] + TIE_TOLERANCE).sum(1)
            better[1, t : t + BLOCK] += (score > target[t : t + BLOCK] + TIE_TOLERANCE).sum(0)
    return tuple((better == 0).double().mean(1).tolist())


def clip_benchmark(images: torch.Tensor, texts: torch.Tensor, device: str) -> tuple[float, float]:
    """Returns R@1 as CLIP_benchmark 1.6 computes it, from one float32 matrix."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), torch.arange(len(scores))] = True
    sides = ((scores.T, positive.T), (scores, positive))
    return tuple(float((batchify(recall_at_k, *side, 64, device, k=1) > 0).float().mean()) for side in sides)


def product(images: torch.Tensor, texts: torch.Tensor, device: str) -> None:
    """Multiplies in float32 alone, in blocks; a lower bound of all sides."""
    images, texts = images.to(device), texts.to(device)
    for i in range(0, len(images), BLOCK):
        for t in range(0, len(texts), BLOCK):
            images[i : i + BLOCK] @ texts[t : t + BLOCK].T


SIDES: dict[str, Callable] = {
    "ours": ours,
    "float64": float64,
    "CLIP_benchmark": clip_benchmark,
    "float32 product": product,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 if a side has another R@1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--noise", type=float, default=3.0, metavar="X", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--sides", default=",".join(SIDES), metavar="S,S", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args(argv)
    found: dict[str, list[tuple]] = {name: [] for name in args.sides.split(",")}
    for _ in range(args.repeats):
        for name in found:
            # A new process for each run, for its peak of memory.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name].append(pool.apply(_measure, (name, args.pairs, args.dim, args.noise, args.device)))
    least = {name: min(seconds for seconds, _, _ in runs) for name, runs in found.items()}
    rows = [
        {
            "side": name,
            "seconds": f"{least[name]:.2f}",
            "spread": f"{least[name]:.2f} .. {max(seconds for seconds, _, _ in runs):.2f}",
            "time over ours": f"{least[name] / least.get('ours', 1.0):.2f}",
            "memory beyond features, MB": f"{min(grown for _, grown, _ in runs) / 1e6:.0f}",
            "R@1": "" if runs[0][2] is None else " / ".join(f"{100 * value:.3f}" for value in runs[0][2]),
        }
        for name, runs in found.items()
    ]
    print(f"{args.pairs:,} x {args.pairs:,} x {args.dim}, {args.device}, {torch.get_num_threads()} threads\n")
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    if args.json:
        args.json.write_text(json.dumps({"flags": vars(args) | {"json": None}, "sides": found}, indent=1) + "\n")
    recalls = {tuple(round(value, 6) for value in runs[0][2]) for runs in found.values() if runs[0][2]}
    return int(len(recalls) > 1)


def _measure(name: str, pairs: int, dim: int, noise: float, device: str) -> tuple[float, float, tuple | None]:
    """Returns seconds, bytes of memory beyond what the process had before, and R@1."""
    rng = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(pairs, dim, generator=rng), dim=1)
    texts = normalize(images + noise * normalize(torch.randn(pairs, dim, generator=rng), dim=1), dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.perf_counter if torch.device(device).type == "cuda" else time.process_time
    SIDES[name](images[:BLOCK], texts[:BLOCK], device)  # the first call initialises libraries
    start = clock()
    recall = SIDES[name](images, texts, device)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), recall


if __name__ == "__main__":
    sys.exit(main())
