"""Measures our commands beside those of open_clip and CLIP_benchmark, as whole processes in turns.

    python -m benchmarks.peers [--only training] [--repeats 3] [--images 1280] [--out logs/peers]

Each peer gets an environment of its own below OUT (pip needs the network the first time). OUT/peers.json holds every
repetition, OUT/peers.png shows the ratios; the table is printed.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.peers.processes import Measured, run_interleaved
from benchmarks.peers.trials import SIZES, TRIALS, Trial
from benchmarks.report import draw_bars


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 if a command fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(TRIALS), metavar="N,N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each side (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help=f"images of each comparison (default: {SIZES})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    parser.add_argument("--out", type=Path, default=Path("logs/peers"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in TRIALS]:
        parser.error(f"--only {args.only}: no comparison is called {unknown[0]}; there are {', '.join(TRIALS)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": _machine(args.threads)}
    for name in tqdm(names, desc="peers", disable=not sys.stderr.isatty()):
        trial = TRIALS[name](out, args.images or SIZES[name])
        try:
            measured = run_interleaved(trial.sides, args.repeats, args.threads, out)
        except RuntimeError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        content[name] = _to_json(trial, measured)
        (out / "peers.json").write_text(json.dumps(content, indent=1) + "\n")  # what is done stays
    print(tabulate(_rows(content), headers="keys", tablefmt="github", disable_numparse=True))
    _draw(content, out / "peers.png")
    print(f"\nRatios above 1: ours is better. Numbers: {out / 'peers.json'}   Figure: {out / 'peers.png'}")
    return 0


def _machine(threads: int) -> dict[str, object]:
    import open_clip

    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "python": platform.python_version()}
    return {"cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0], **versions}


def _to_json(trial: Trial, measured: dict[str, Measured]) -> dict[str, object]:
    content = {"title": trial.title, "metric": trial.metric, "sides": {}}
    ours = measured["ours"]
    for name, side in measured.items():
        if trial.metric == "seconds":
            ratio = side.median_s / ours.median_s
        else:
            ratio = ours.numbers[trial.metric] / side.numbers[trial.metric]
        content["sides"][name] = {
            "seconds": side.seconds,
            "median_seconds": side.median_s,
            "peak_bytes": side.median_bytes,
            **side.numbers,
            "ratio": ratio,
        }
    return content


def _rows(content: dict) -> list[dict[str, str]]:
    rows = []
    for trial in (value for name, value in content.items() if name != "machine"):
        for name, side in trial["sides"].items():
            recall = f"{side['i2t']:.3f} / {side['t2i']:.3f}" if "i2t" in side else ""
            speed = f"{side['samples_per_s']:.1f}" if "samples_per_s" in side else ""
            rows.append(
                {
                    "work": trial["title"],
                    "tool": name,
                    "seconds (median)": f"{side['median_seconds']:.1f}",
                    "spread": f"{min(side['seconds']):.1f} .. {max(side['seconds']):.1f}",
                    "peak memory, GB": f"{side['peak_bytes'] / 1e9:.2f}",
                    "samples/s": speed,
                    "R@1": recall,
                    "ratio to ours": f"{side['ratio']:.2f}",
                }
            )
    return rows


def _draw(content: dict, path: Path) -> None:
    bars = [
        (f"{key}: {name}", side["ratio"], "tab:blue")
        for key, trial in content.items()
        if key != "machine"
        for name, side in trial["sides"].items()
        if not name.startswith("ours")  # a faster mode of ours is no peer; it is in the table
    ]
    draw_bars(bars, "time of the other tool over ours (above 1: ours is faster)", path, line_at=1)


if __name__ == "__main__":
    sys.exit(main())
