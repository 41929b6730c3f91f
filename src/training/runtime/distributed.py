"""The processes of a run: rank, device, and collectives, which do nothing in a run with a single process.

A rank that fails does not tell the others by a collective, because they may never come to it. It raises, and the
watchdogs end the other ranks (see watchdog.py).
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device_so

from training.runtime.processes import EXIT_LOST, LONG_PHASE, SIGNALS, StoppedError, end_at_once

CHUNK_ROWS = 65_536
T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """Rank and device of this process.

    Attributes:
        rank: 0 to world_size - 1; only rank 0 writes files and prints.
        world_size: number of processes.
        device: device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_ranks(device: str | None, timeout_minutes: float = 30.0) -> DistEnv:
    """Joins the process group that torchrun or srun describe in the environment.

    Args:
        device: ``cuda``, ``cpu``, ...; None uses CUDA if available. With several processes, each uses the device of its
            local rank.
        timeout_minutes: a process that has not connected to all others by then exits with `EXIT_LOST`. Collectives
            time out five minutes after the watchdog's longest `LONG_PHASE`, because it names the late rank.

    Raises:
        ValueError: the device does not exist.
    """
    who = f"rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID', '?')}"
    message = f"python -m training.main: error: {who} could not connect within {timeout_minutes:g} minutes"
    alarm = threading.Timer(60 * timeout_minutes, end_at_once, [EXIT_LOST, message])
    alarm.daemon = True
    alarm.start()
    try:
        info = init_distributed_device_so(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        alarm.cancel()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; training's towers choose TF32, see arithmetic.py
    if dist.is_initialized():
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(minutes=LONG_PHASE * timeout_minutes + 5), dist.group.WORLD)
    return DistEnv(info["global_rank"], info["world_size"], torch.device(info["device"]))


def check_launch() -> None:
    """Checks the environment variables of torchrun, srun or a batch script before a process waits for others.

    A process that was started by hand in a job with several tasks runs alone: ``WORLD_SIZE`` is set to 1, and a warning
    is printed.

    Raises:
        ValueError: several processes were started, but MASTER_ADDR or MASTER_PORT is missing.
    """
    name = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "SLURM_NTASKS"
    number = os.environ.get(name, "1")
    if not number.isdecimal():
        raise ValueError(f"{name}={number}: expected the number of processes; unset it to run one")
    by_torchrun = name == "WORLD_SIZE" and "RANK" in os.environ
    by_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or int(os.environ.get("SLURM_PROCID") or 0) > 0
    if int(number) <= 1:
        return
    if not by_torchrun and not by_srun:
        print(
            f"WARNING: {name}={number}, but this process was started alone: it runs as one process. Start {number} "
            "with torchrun --nproc_per_node N -m -- training.main ..., or with srun and MASTER_ADDR, MASTER_PORT set.",
            file=sys.stderr,  # logging is not set up yet
        )
        os.environ["WORLD_SIZE"] = "1"
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"{name}={number}, but MASTER_ADDR or MASTER_PORT is not set, so the processes can't connect. In a SLURM "
            'script, add before srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
            "MASTER_PORT=29500; elsewhere, start them with torchrun; for one process: unset WORLD_SIZE RANK"
        )


def check_device(device: str | None) -> torch.device:
    """Returns the device that a flag names, by default a GPU if there is one.

    Raises:
        ValueError: this machine does not have the device.
    """
    if device is None:  # no tensor is made, because the process may use another GPU than the first
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: not usable here ({reason}); omit it or use cpu") from error
    return torch.device(device)


class RunFailedError(Exception):
    """An error whose message is enough for the user: it is printed without a traceback.

    Attributes:
        code: exit code. 1: data, loss or disk failed during the work; 2: wrong flags, files or weights.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextmanager
def failing_with(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into `RunFailedError` with an exit code."""
    try:
        yield
    except kinds as error:
        raise RunFailedError(str(error), code) from error


def print_error(message: object) -> None:
    """Prints an error in the form of argparse."""
    print(f"python -m training.main: error: {message}", file=sys.stderr, flush=True)


def on_main_rank(function: Callable[[], T], env: DistEnv) -> T:
    """Calls a function on rank 0 only, and returns its result on every rank; an error is raised on rank 0 only."""
    if env.world_size == 1:
        return function()
    box: list = [function() if env.is_main else None]
    dist.broadcast_object_list(box, src=0, device=env.device)
    return box[0]


def gather_objects(value: T, env: DistEnv) -> list[T]:
    """Returns the values of all ranks in rank order, on every rank."""
    if env.world_size == 1:
        return [value]
    values: list = [None] * env.world_size
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: torch.Tensor, env: DistEnv) -> torch.Tensor:
    """Sums a CPU tensor over all ranks, in place, in chunks of rows to save GPU memory.

    If each row is nonzero on one rank only, this is an exact gather: x + 0 = x.
    """
    if env.world_size > 1:
        for start in range(0, tensor.shape[0], CHUNK_ROWS):
            chunk = tensor[start : start + CHUNK_ROWS].to(env.device)
            dist.all_reduce(chunk)
            tensor[start : start + CHUNK_ROWS] = chunk.cpu()
    return tensor


def join_rows(parts: Iterable[tuple[slice | list[int], torch.Tensor]], number: int, env: DistEnv) -> torch.Tensor:
    """Returns the rows [number, dim] of all ranks, complete on every rank, float32 on the CPU.

    Args:
        parts: this rank's (positions, rows [n, dim]); each position belongs to one rank, others stay zero.
        number: number of rows.
        env: this process.
    """
    parts = list(parts)
    dim = torch.tensor(max((rows.shape[1] for _, rows in parts), default=0), device=env.device)
    joined = torch.zeros(number, int(max_over_ranks(dim, env)))
    for positions, rows in parts:
        joined[positions] = rows
    return sum_over_ranks(joined, env)


def max_over_ranks(value: torch.Tensor, env: DistEnv) -> torch.Tensor:
    """Replaces a tensor on the device by its largest values of all ranks, without synchronising with the device."""
    if env.world_size > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def stop_on_every_rank(env: DistEnv) -> None:
    """Raises StoppedError on all ranks if any has received a stop signal; a collective, so all ranks must call it."""
    # The exception of a rank that stopped alone would be taken for a failure of this rank.
    stop = torch.zeros((), device=env.device)
    if SIGNALS.name:
        stop.fill_(1)
    if max_over_ranks(stop, env):
        raise StoppedError(f"stopped by {SIGNALS.name or 'a signal'}")
