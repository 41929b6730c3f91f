"""Starts trainings as processes and kills them: see `support.run_lab`.

A job has ``argv``, ``world_size``, ``ports``, ``samples`` (a folder) and ``kills``: [signal, place, number, rank] for
each training. After these, one more training runs without a kill, unless ``last`` is false. A rank sends the signal to
itself when it reaches the place for the given number of times: ``build`` (all data are opened), ``step`` (a step is
taken, but not saved yet) or ``save`` (a checkpoint is written, but not renamed yet). A rank that was stopped by SIGSTOP
is killed when the other ranks have ended. Prints exit codes by training and rank.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training.main import main
from training.train import checkpoint, run
from training.train.step_log import StepFlags

PATIENCE = 120.0  # seconds that a rank may run longer than another


def record_samples(folder: Path, rank: int) -> None:
    """Makes training write the samples of every step to a file before the step is saved."""
    original = StepFlags.add

    def add(self: StepFlags, step: int, flags: torch.Tensor, keys: list[str]) -> tuple[bool, bool]:
        with open(folder / f"rank{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, keys]) + "\n")
        return original(self, step, flags, keys)

    StepFlags.add = add


def signal_itself(number: int, place: str, times: int) -> None:
    """Makes this process signal itself, and like SLURM its loader processes, at a named place."""
    left = itertools.count(times - 1, -1)

    def reached() -> None:
        if next(left) == 0:
            loaders = children(os.getpid()) if number == signal.SIGTERM else []
            # Sent by another process, like SLURM's: loader processes obey signals of their parent.
            subprocess.run(["kill", f"-{number}", *map(str, loaders), str(os.getpid())], stderr=subprocess.DEVNULL)

    if place == "build":
        run.make_stepper = after(reached, run.make_stepper)
    elif place == "step":
        StepFlags.add = after(reached, StepFlags.add)
    else:
        atomic_write = checkpoint.atomic_write

        @contextmanager
        def atomic_write_reached(path: Path) -> Iterator[Path]:
            with atomic_write(path) as temporary:
                yield temporary
                reached()

        checkpoint.atomic_write = atomic_write_reached


def after(call: Callable, function: Callable) -> Callable:
    """Returns a function that calls `function` and then `call`."""

    def both(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)
        call()
        return result

    return both


def start_rank(job: dict, rank: int, port: int, kill: list | None) -> int:
    """Forks a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        if job["world_size"] > 1:
            os.environ |= {"WORLD_SIZE": str(job["world_size"]), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        record_samples(Path(job["samples"]), rank)
        if kill and kill[3] == rank:
            signal_itself(*kill[:3])
        code = main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def children(pid: int) -> list[int]:
    """Returns the child processes of a process; none if the system has no /proc."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def train_once(job: dict, port: int, kill: list | None) -> list[int]:
    """Runs one training; returns the exit codes of its ranks, negative for a signal."""
    pids = [start_rank(job, rank, port, kill) for rank in range(job["world_size"])]
    codes: dict[int, int] = {}
    deadline, halted = None, pids[kill[3]] if kill and kill[0] == signal.SIGSTOP else None
    while len(codes) < len(pids):
        now = time.monotonic()
        if halted and len(codes) == len(pids) - 1:
            os.kill(halted, signal.SIGKILL)
        if deadline and now > deadline:
            for rank in set(range(len(pids))) - set(codes):
                os.kill(pids[rank], signal.SIGKILL)
            raise SystemExit(f"still there {PATIENCE:.0f} s after another rank's end: {codes}")
        for rank, pid in enumerate(pids):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    deadline = deadline or now + PATIENCE
        time.sleep(0.005)
    return [codes[rank] for rank in range(len(pids))]


def run_job(job: dict) -> None:
    """Runs all trainings of a job; prints their codes."""
    torch.set_num_threads(1)
    kills = job["kills"] + [None] * job["last"]
    all_codes = [train_once(job, job["ports"][i], kill) for i, kill in enumerate(kills)]
    print(json.dumps(all_codes), flush=True)
