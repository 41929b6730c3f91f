"""Compares our implementation with the published scheme, figure by figure, in one process.

    python -m benchmarks [--quick] [--json FILE] [--only loss,text_step] [--device cpu]

Every figure first checks that both sides give the same result. The command prints a table of ratios (baseline over
ours, so higher is better), and writes all numbers to FILE and a plot of the ratios beside it (.png).
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FIGURES = (
    "text_step",
    "stock_text",
    "loss",
    "loss_large",
    "train_step",
    "precision",
    "evaluation",
    "data_loading",
    "data_mixing",
    "saving",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 if the two sides of a figure differ; exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes: about a minute on two CPU cores")
    parser.add_argument("--json", default="logs/benchmarks.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--only", default=",".join(FIGURES), metavar="N,N", help="which figures (default: %(default)s)")
    parser.add_argument("--device", default=None, metavar="DEV", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"--only {args.only}: no figure is called {unknown[0]}; there are {', '.join(FIGURES)}")
    path = Path(args.json)
    if path.suffix == ".png" or path.is_dir():
        parser.error(f"--json {args.json}: expected the name of a JSON file; the plot gets the same name with .png")
    try:
        return _run(args, names, path)
    except AssertionError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run(args: argparse.Namespace, names: list[str], path: Path) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory on the CPU, logs too much
    from tqdm import tqdm

    from benchmarks.measure import Setting
    from benchmarks.report import draw, format_table, to_json
    from training.runtime.distributed import check_device

    device = check_device(args.device)
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, args.quick, Path(folder), repeats=1 if args.quick else 3)
        for module in tqdm(modules, desc="benchmarks", disable=not sys.stderr.isatty()):
            for figure in module.run(setting):
                figures.append(figure)
                path.write_text(json.dumps(to_json(figures, setting), indent=1) + "\n")  # keeps results if interrupted
    draw(figures, path.with_suffix(".png"))
    print(format_table(figures))
    print(f"\nRatios are baseline over ours. Numbers: {path}   Plot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
