"""Runs a study: a grid of arms x seeds, each trained and evaluated by the commands that a user would type.

    python scripts/studies/run.py STUDY.yaml --data DIR --out DIR [--jobs N] [--arms A,B] [--seeds 0,1]

STUDY.yaml names the data by {data}, the study's results by {out} and files beside itself by {here}:

    title       one line
    launch      optional, in place of this Python, e.g. torchrun --nproc-per-node 8
    model       flags of every command
    extract     optional: flags that extract the locked image tower's features to {out}/features, once
    train       flags of every training
    arms        name -> title, and flags of this arm's training; under `model` those of its model
    evaluate    name -> flags of an evaluation
    diagnose    optional: the `evaluation` whose diagnostics of long text are wanted, for which `arms` and `seeds`
    seeds       list; an arm may have a shorter list of its own
    baseline    the arm that the others are compared with

Every run lies in OUT/ARM-sSEED and is finished when result.json is there: then it is skipped. An unfinished one is
resumed. Seeds come one after another, so that all arms have a first result early. With --jobs N, N runs go at a time,
each on a GPU of its own where there are several. At the end OUT gets study.json, table.csv, table.md and the figures.
"""

import argparse
import json
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


IMAGE_START = "pretrained-image"  # flag that only a training takes


@dataclass(frozen=True)
class Study:
    """A study's file, with the places put in.

    Attributes:
        content: of the file.
        out: folder of all results.
        launch: words in front of ``-m training.main``.
    """

    content: dict
    out: Path
    launch: list[str]

    def runs(self, arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
        """All (arm, seed) of the grid, the first seed of every arm first; empty lists choose all."""
        own = {name: arm.get("seeds", self.content["seeds"]) for name, arm in self.content["arms"].items()}
        every = sorted({seed for values in own.values() for seed in values})
        grid = [(name, seed) for seed in every for name in own if seed in own[name]]
        return [(n, s) for n, s in grid if (not arms or n in arms) and (not seeds or s in seeds)]


def read_study(path: Path, data: Path, out: Path) -> Study:
    """Reads a study.

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
    return Study(content, out, shlex.split(content.get("launch", "")) or [sys.executable])


def words(flags: dict) -> list[str]:
    """Flags of a study as words of a command line: true for a switch, a list for several values, null for none."""
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
    """Runs ``training.main``; returns its seconds.

    Raises:
        RuntimeError: it failed; the message names the log.
    """
    command = [*study.launch, "-m", "training.main", *words(flags)]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"exit code {code}; see {log}")
    return time.monotonic() - start


def extract(study: Study) -> dict:
    """Extracts features if the study wants it and they are not there; returns the flags of training on them."""
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
    """Trains an arm from where it stopped, evaluates it, and writes its result.json."""
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
    """Runs all of the grid, `jobs` at a time; returns how many failed."""
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
    """Returns 0, 1 if a run failed, or 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="what {data} stands for")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all results")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--arms", default="", metavar="A,B", help="these arms alone")
    parser.add_argument("--seeds", default="", metavar="N,N", help="these seeds alone")
    args = parser.parse_args()
    try:
        study = read_study(args.study, args.data, args.out)
        grid = study.runs(args.arms.split(",") if args.arms else [], [int(s) for s in args.seeds.split(",") if s])
        if not grid or args.jobs < 1:
            raise ValueError(f"--arms, --seeds, --jobs: no run left; the arms are {', '.join(study.content['arms'])}")
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
