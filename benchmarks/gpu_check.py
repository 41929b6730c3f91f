"""Measures everything on a GPU with one command: environment, GPU tests, and every figure at full size.

    make gpu-check              on one NVIDIA GPU: writes figures/gpu-NAME.json and .png
    make gpu-check CPU=1        the same steps with small sizes, on the CPU, to show that they work

Each step is a separate process, so one that fails or runs out of memory loses only its own figure. Each has a share of
the time limit for itself, and also gets the time that steps before it did not use. A step that needs more is stopped
with all its processes, and recorded as cut short. The files are written after every step, with what the step had
measured when it was stopped.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.report import draw_bars

TESTS = "tests"
SHARES = {  # of the time limit
    TESTS: 0.2,
    "train_step": 0.2,
    "text_step": 0.15,
    "loss": 0.1,
    "loss_large": 0.1,
    "precision": 0.1,
    "evaluation": 0.15,
}
FIGURES = tuple(name for name in SHARES if name != TESTS)
TARGETS = {  # of one H100 or H200
    "train_step.time_ratio": 2.5,
    "train_step_cached.time_ratio": 6.0,
    "text_step.flop_utilisation": 0.45,
}
LIMIT_S = 540
PACKAGES = ("open_clip_torch", "transformers", "timm", "numpy", "Pillow")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 if a step failed, 2 where there is no GPU and the CPU was not asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="run everything shrunken on the CPU")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, metavar="S", help="default: %(default)s seconds")
    parser.add_argument("--skip-tests", action="store_true", help="leave out tests/test_gpu.py")
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; on a machine without one: make gpu-check CPU=1")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.cpu else "cuda"
    name = "cpu" if args.cpu else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path, end = args.out / f"gpu-{name}.json", time.monotonic() + args.limit_s
    content = {"environment": describe_environment(), "steps": {}, "figures": {}}
    steps = FIGURES if args.skip_tests else (TESTS, *FIGURES)
    for number, step in enumerate(steps):
        deadline = end - args.limit_s * sum(SHARES[later] for later in steps[number + 1 :])
        if step == TESTS:
            content["steps"][step] = _run_tests(device, deadline)
        else:
            content["steps"][step], found = _run_figure(step, device, deadline)
            content["figures"] |= found
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _draw(content["figures"], path.with_suffix(".png"))
        print(f"{step}: {content['steps'][step]['outcome']}", flush=True)
    print(tabulate(compare_with_targets(content["figures"]), headers="keys", tablefmt="github"))
    print(f"\nNumbers: {path}   Figure: {path.with_suffix('.png')}")
    return int(any(step["outcome"] != "done" for step in content["steps"].values()))


def describe_environment() -> dict[str, object]:
    """Returns the card, driver, versions and precision settings that figures depend on."""
    content: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        **{package: version(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        content |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return content


def _run_tests(device: str, deadline: float) -> dict[str, object]:
    """Runs the tests of what differs on a GPU, there or, with the same code, on the CPU."""
    chosen = ["-k", "cpu"] if device == "cpu" else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", *chosen, "-n", "0", "-p", "no:cacheprovider"]
    code, text, seconds = _run(command + ["-o", "addopts=--import-mode=importlib"], deadline)
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return {"outcome": _outcome(code), "summary": last.strip("= "), "seconds": round(seconds, 1)}


def _run_figure(figure: str, device: str, deadline: float) -> tuple[dict[str, object], dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figure.json")
        command = [sys.executable, "-m", "benchmarks", "--only", figure, "--json", str(path), "--device", device]
        code, text, seconds = _run(command + (["--quick"] if device == "cpu" else []), deadline)
        found = json.loads(path.read_text()) if path.is_file() else {}
    found.pop("machine", None)
    step: dict[str, object] = {"outcome": _outcome(code), "seconds": round(seconds, 1)}
    if code:
        step["output"] = text[-1500:]
    return step, found


def _run(command: list[str], deadline: float) -> tuple[int | None, str, float]:
    """Returns (exit code, or None if the time limit came first; what was printed; seconds)."""
    start = time.monotonic()
    left = deadline - start
    if left <= 0:
        return None, "not started: the time limit had passed", 0.0
    # A session of its own, so that all of its processes can be stopped: loader processes would keep the pipe open.
    work = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = work.communicate(timeout=left)
    except BaseException as error:  # also Ctrl-C, which does not reach the other session
        with suppress(ProcessLookupError):
            os.killpg(work.pid, signal.SIGKILL)
        work.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, "stopped by the time limit", time.monotonic() - start
        raise
    return work.returncode, text, time.monotonic() - start


def _outcome(code: int | None) -> str:
    return "cut short by the time limit" if code is None else "done" if code == 0 else f"failed with exit code {code}"


def compare_with_targets(figures: dict) -> list[dict[str, object]]:
    """Returns one row per ratio or utilisation: measured, and the target for one H100 or H200 where there is one."""
    rows = []
    for name, figure in figures.items():
        for key, value in figure.items():
            if key.endswith("_ratio") or key in ("flop_utilisation", "products_utilisation", "largest_difference"):
                target = TARGETS.get(f"{name}.{key}", "")
                rows.append({"figure": name, "number": key, "measured": round(value, 3), "target (H100)": target})
    return rows


def _draw(figures: dict, path: Path) -> None:
    rows = [row for row in compare_with_targets(figures) if row["number"] != "largest_difference"]
    bars = [(f"{row['figure']}: {row['number']}", row["measured"], "tab:blue") for row in rows]
    label = "ratio to the published scheme, or share of the matrix rate; black mark: target"
    draw_bars(bars, label, path, marks=[row["target (H100)"] or None for row in rows])


if __name__ == "__main__":
    sys.exit(main())
