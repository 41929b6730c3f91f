"""The processes of a run: rank, device, and collectives, which do nothing in a run with a single process."""

import logging
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

from training.runtime.stop import StoppedError

EXIT_LOST = 70  # sysexits.h: internal error
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


@contextmanager
def distributed(device: str | None, timeout_minutes: float = 30.0) -> Iterator[DistEnv]:
    """Joins the process group that torchrun or srun describe in the environment, and leaves it at the end.

    Args:
        device: ``cuda``, ``cpu``, ...; None uses CUDA if available. With several processes, each uses the device of its
            local rank.
        timeout_minutes: a process that has not connected to all others by then exits with `EXIT_LOST`.

    Raises:
        ValueError: the device does not exist.
    """
    alarm = threading.Timer(60 * timeout_minutes, _end_alone, [timeout_minutes])
    alarm.daemon = True
    alarm.start()
    try:
        info = init_distributed_device_so(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        alarm.cancel()
    last = torch.zeros(1, device=info["device"])
    try:
        yield DistEnv(info["global_rank"], info["world_size"], torch.device(info["device"]))
        if dist.is_initialized():
            # In torch 2.6, gloo's threads take the GIL to free the tensors of finished work, while the destruction of
            # the group holds the GIL and waits for these threads. A last collective, whose tensor outlives the group,
            # ensures that no such tensor is left.
            dist.all_reduce(last)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_alone(minutes: float) -> None:
    who = f"rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID', '?')}"
    print(f"python -m training.main: error: {who} could not connect within {minutes:g} minutes", file=sys.stderr)
    os._exit(EXIT_LOST)


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


def check_device(device: str | None) -> None:
    """Raises ValueError for a device that this machine does not have, instead of falling back silently."""
    if device is None:
        return
    try:
        kind = torch.device(device).type
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: not usable here ({reason}); omit it or use cpu") from error


def broadcast_object(value: T, env: DistEnv) -> T:
    """Returns rank 0's value on every rank."""
    if env.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=env.device)
    return box[0]


def agree(check: Callable[[], T], env: DistEnv) -> T:
    """Runs a function on rank 0; every rank returns its result, or raises its ValueError or OSError."""
    outcome = None
    if env.is_main:
        try:
            outcome = check()
        except (ValueError, OSError) as error:
            outcome = error
    outcome = broadcast_object(outcome, env)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def together(build: Callable[[], T], env: DistEnv) -> T:
    """Runs a function without collectives on every rank; if one fails, all ranks raise, so that none waits forever."""
    result, error = None, None
    try:
        result = build()
    except (ValueError, OSError) as caught:
        error = caught
    raise_together(error, env)
    return result


def fail(error: Exception, code: int, env: DistEnv | None = None) -> int:
    """Prints an error, only on rank 0; returns the exit code."""
    if env is None or env.is_main:
        print(f"python -m training.main: error: {error}", file=sys.stderr)
    return code


def raise_together(error: Exception | None, env: DistEnv) -> None:
    """Raises on every rank if any rank has an error, so that no rank waits for one that stopped.

    If a signal stopped a rank, all ranks raise its StoppedError. Otherwise a rank with an error raises its own error,
    and all other ranks raise the error of the first rank that has one.
    """
    if env.world_size == 1:
        errors = [error]
    else:
        errors = [None] * env.world_size
        dist.all_gather_object(errors, error)
    failed = [(rank, e) for rank, e in enumerate(errors) if e is not None]
    stopped = [e for _, e in failed if isinstance(e, StoppedError)]
    if stopped:
        raise stopped[0]
    if error is not None:
        raise error
    if failed:
        logging.error(f"rank {failed[0][0]} failed")
        raise failed[0][1]


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
    joined = torch.zeros(number, max_over_ranks(max((rows.shape[1] for _, rows in parts), default=0), env))
    for positions, rows in parts:
        joined[positions] = rows
    return sum_over_ranks(joined, env)


def merge_over_ranks(entries: dict, env: DistEnv) -> dict:
    """Returns the union of all ranks' dicts, sorted by key, on every rank."""
    parts = [entries]
    if env.world_size > 1:
        parts = [{}] * env.world_size
        dist.all_gather_object(parts, entries)
    return dict(sorted(item for part in parts for item in part.items()))


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended; torch has no single exception type for this."""
    words = ("gloo", "NCCL", "closed by peer", "TCPStore")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def any_rank(flag: torch.Tensor, env: DistEnv) -> torch.Tensor:
    """Returns whether a flag (0 or 1, on the device) is set on any rank, without synchronising with the device."""
    if env.world_size > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def set_timeout(env: DistEnv, minutes: float) -> None:
    """Makes collectives time out after the watchdog, whose message names the rank; the backends' defaults differ."""
    if env.world_size > 1:
        set_ = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_(timedelta(minutes=minutes + 5), dist.group.WORLD)


def max_over_ranks(value: int, env: DistEnv) -> int:
    """Returns the largest value of all ranks."""
    if env.world_size == 1:
        return value
    box = torch.tensor(value, device=env.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
