"""Starts trainings as processes and kills them: see `support.run_lab`.

The job: ``argv``, ``world_size``, ``ports``, ``samples`` (a folder) and ``kills``: [signal, seconds, rank] for a
training each, after which one runs that nobody kills, unless ``last`` is false. Seconds count from the start, or with
``once_training`` from when every rank has made a step. A rank that was halted (SIGSTOP) is
killed when the others have ended. Prints exit codes, by training and rank.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from training.main import main
from training.train.nonfinite import StepGuard

PATIENCE = 60.0  # seconds that a rank may outlive another, or a signal


def record_samples(folder: Path, rank: int) -> None:
    """Has every step's samples written down before it is saved."""
    original = StepGuard.add

    def add(self: StepGuard, step: int, skipped: torch.Tensor, keys: list[str]) -> None:
        with open(folder / f"rank{rank}.jsonl", "a") as file:
            file.write(json.dumps([step, keys]) + "\n")
        original(self, step, skipped, keys)

    StepGuard.add = add


def start_rank(job: dict, rank: int, port: int) -> int:
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
        code = main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def children(pid: int) -> list[int]:
    """Processes that a process has started; none where there is no /proc."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def train_once(job: dict, port: int, kill: list | None) -> list[int]:
    """One training; returns its ranks' exit codes, negative for a signal."""
    pids = [start_rank(job, rank, port) for rank in range(job["world_size"])]
    codes: dict[int, int] = {}
    deadline = halted = None
    is_training = False
    start = time.monotonic()
    while len(codes) < len(pids):
        now = time.monotonic()
        if job["once_training"] and not is_training:
            start, is_training = now, all(Path(job["samples"], f"rank{r}.jsonl").exists() for r in range(len(pids)))
        if kill and now - start >= kill[1]:
            if kill[2] not in codes:
                # SLURM's signals reach the loader's workers, too.
                family = children(pids[kill[2]]) if kill[0] == signal.SIGTERM else []
                for pid in [*family, pids[kill[2]]]:
                    os.kill(pid, kill[0])
                halted = pids[kill[2]] if kill[0] == signal.SIGSTOP else None
            kill, deadline = None, now + PATIENCE
        if halted and len(codes) == len(pids) - 1:
            os.kill(halted, signal.SIGKILL)
        if deadline and now > deadline:
            for rank in set(range(len(pids))) - set(codes):
                os.kill(pids[rank], signal.SIGKILL)
            raise SystemExit(f"still there {PATIENCE:.0f} s after a signal or another rank's end: {codes}")
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
