"""Runs a study: a grid of arms x seeds, each trained and evaluated by the commands that a user would type.

    python scripts/studies/run.py STUDY.yaml --data DIR --out DIR [--jobs N] [--arms A,B] [--seeds 0,1]

In STUDY.yaml, {data} is the folder of the data, {out} the folder of the results, and {here} the folder of the file:

    title       one line
    launch      optional: command instead of this Python, e.g. torchrun --nproc-per-node 8
    model       flags of every command
    extract     optional: flags of a command that extracts the locked image tower's features to {out}/features, once
    train       flags of every training
    arms        name -> `title`, `flags` of the arm's training, `model`: flags of its model
    evaluate    name -> flags of an evaluation
    diagnose    optional: `evaluation` to run with the diagnostics of long text, for these `arms` and `seeds`
    seeds       list of seeds; an arm may have its own, shorter list
    baseline    the arm with which other arms are compared

Each run has a folder OUT/ARM-sSEED. It is finished, and then skipped, when result.json exists; unfinished runs are
resumed. All arms run with the first seed before the next seed begins. With --jobs N, N runs are active at a time; if
there are several GPUs, each run has its own. At the end, study.json, table.csv, table.md and figures are written to
OUT.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import record
import report
import torch
import yaml

KEYS = {"title", "notes", "launch", "model", "extract", "train", "arms", "evaluate", "diagnose", "seeds", "baseline"}
IMAGE_START = "pretrained-image"  # a flag for training only


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        content: the parsed YAML, with {data}, {out} and {here} replaced.
        out: folder of all results.
        launch: words of the command line before ``-m training.main``; empty for this Python.
    """

    content: dict
    out: Path
    launch: list[str]

    def runs(self, arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
        """Returns the (arm, seed) pairs of the grid, ordered by seed; an empty list of arms or seeds means all."""
        own = {name: arm.get("seeds", self.content["seeds"]) for name, arm in self.content["arms"].items()}
        every = sorted({seed for values in own.values() for seed in values})
        grid = [(name, seed) for seed in every for name in own if seed in own[name]]
        return [(n, s) for n, s in grid if (not arms or n in arms) and (not seeds or s in seeds)]


def read_study(path: Path, data: Path, out: Path) -> Study:
    """Reads a study's file.

    Raises:
        ValueError: the message names the file, what was found and what was expected.
    """
    text = path.read_text(encoding="utf-8")
    for name, place in (("data", data), ("out", out), ("here", path.parent)):
        text = text.replace(f"{{{name}}}", str(place.resolve()))
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or set(content) - KEYS:
        found = ", ".join(sorted(set(content) - KEYS)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: found {found}; expected the keys {', '.join(sorted(KEYS))}")
    for key in ("title", "model", "train", "arms", "evaluate", "seeds", "baseline"):
        if not content.get(key):
            raise ValueError(f"{path}: the key {key} is missing or empty")
    if content["baseline"] not in content["arms"]:
        raise ValueError(f"{path}: baseline {content['baseline']}: expected one of {', '.join(content['arms'])}")
    content["arms"] = {name: arm or {} for name, arm in content["arms"].items()}
    return Study(content, out, shlex.split(content.get("launch", "")))


def words(flags: dict) -> list[str]:
    """Converts flags of a study to words of a command line.

    true gives a switch, false its negative form, a list several values; null omits the flag.
    """
    found = []
    for name, value in flags.items():
        if value is None:
            continue
        if value is False:
            found.append(f"--no-{name}")
        else:
            values = [] if value is True else value if isinstance(value, list) else [value]
            found += [f"--{name}", *map(str, values)]
    return found


def call(study: Study, flags: dict, log: Path, gpu: int | None = None) -> float:
    """Runs ``training.main``; returns the seconds it took.

    Raises:
        RuntimeError: the command failed; the message names the log.
    """
    command = [*(study.launch or [sys.executable]), "-m", "training.main", *words(flags)]
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        if study.launch:
            code = subprocess.run(command, stdout=file, stderr=file, env=os.environ | environment).returncode
        else:
            # Forked from a process that has imported everything, because a command of its own takes seconds to start.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["training.train.run", "training.eval.run"])
            process = context.Process(target=run_forked, args=(words(flags), log, environment))
            process.start()
            process.join()
            code = process.exitcode
    if code:
        raise RuntimeError(f"exit code {code}; see {log}")
    return time.monotonic() - start


def run_forked(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """Runs ``training.main`` in this process, with its output in a file; ends the process."""
    from training.main import main

    multiprocessing.set_start_method(None, force=True)  # its loader processes are not forked from the server
    os.environ |= environment
    with open(log, "a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.exit(main(argv))


def extract(study: Study) -> dict:
    """Extracts features if the study needs them and they don't exist; returns the flags of training on them."""
    if "extract" not in study.content:
        return {}
    folder, done = study.out / "features", study.out / "features.done"
    if not done.exists():
        print("extracting image features", flush=True)
        flags = {**study.content["model"], **study.content["extract"], "extract-image-features": folder}
        call(study, flags, study.out / "extract.log")
        done.touch()
    return {"train-data": folder, "lock-image": True}


def run(study: Study, data: dict, arm: str, seed: int, gpu: int | None) -> None:
    """Trains and evaluates one arm with one seed, unless it is done."""
    name, chosen = f"{arm}-s{seed}", study.content["arms"][arm]
    folder, log = study.out / name, study.out / name / "commands.log"
    model = study.content["model"] | chosen.get("model", {})
    if not (folder / "result.json").exists():
        train_and_evaluate(study, data, arm, seed, model, gpu)
    wanted = study.content.get("diagnose", {"arms": []})
    if arm in wanted["arms"] and seed in wanted["seeds"] and not (folder / record.DIAGNOSTICS).exists():
        flags = {k: v for k, v in (model | study.content["evaluate"][wanted["evaluation"]]).items() if k != IMAGE_START}
        flags |= {"diagnostics": True, "pretrained": record.last_checkpoint(folder), "logs": folder}
        call(study, {**flags, "name": "diagnostics"}, log, gpu)


def train_and_evaluate(study: Study, data: dict, arm: str, seed: int, model: dict, gpu: int | None) -> None:
    """Trains an arm, continuing an interrupted run, evaluates it, and writes its result.json."""
    name, chosen = f"{arm}-s{seed}", study.content["arms"][arm]
    folder, log = study.out / name, study.out / name / "commands.log"
    flags = {**model, **data, **study.content["train"], **chosen.get("flags", {}), "seed": seed}
    place = {"logs": study.out, "name": name}
    seconds = call(study, {**flags, **place, "resume": "latest"}, log, gpu)
    weights, trained = record.last_checkpoint(folder), {k: v for k, v in model.items() if k != IMAGE_START}
    for which, own in study.content["evaluate"].items():
        call(study, {**trained, **own, "pretrained": weights, "logs": folder, "name": which}, log, gpu)
    result = {"arm": arm, "seed": seed, "train_seconds": round(seconds, 1), **record.collect(folder, study.content)}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {report.one_line(result)}", flush=True)


def run_grid(study: Study, grid: list[tuple[str, int]], jobs: int) -> int:
    """Runs the whole grid, `jobs` runs at a time; returns how many failed."""
    data = extract(study)
    num_gpus = torch.cuda.device_count()
    slots: SimpleQueue[int | None] = SimpleQueue()
    for job in range(jobs):
        slots.put(job % num_gpus if jobs > 1 and num_gpus > 1 else None)

    def one(arm: str, seed: int) -> int:
        slot = slots.get()
        try:
            run(study, data, arm, seed, slot)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"{arm}-s{seed} failed: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            slots.put(slot)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, *zip(*grid)))


def main() -> int:
    """Runs the command line; returns 0, or 1 if a run failed; exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the data, {data}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all results")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--arms", default="", metavar="A,B", help="run only these arms")
    parser.add_argument("--seeds", default="", metavar="N,N", help="run only these seeds")
    args = parser.parse_args()
    try:
        study = read_study(args.study, args.data, args.out)
        grid = study.runs(args.arms.split(",") if args.arms else [], [int(s) for s in args.seeds.split(",") if s])
        if not grid or args.jobs < 1:
            raise ValueError(
                f"--arms, --seeds, --jobs: nothing to run; expected arms among {', '.join(study.content['arms'])}"
            )
        failed = run_grid(study, grid, args.jobs)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    recorded = record.record(study.content, study.out)
    if recorded["runs"]:
        report.write_tables(recorded, study.out)
        report.draw(recorded, study.out)
        print(report.markdown(recorded))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
