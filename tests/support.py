"""What tests share: the locations of reference files, and functions to run the command line as a user does."""

import json
import multiprocessing as mp
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

REFERENCE = Path(__file__).parent / "reference"
LAYOUTS = REFERENCE / "layouts"
# One layer of 32 dimensions a tower. Most tests of training ask what a run does, not what it learns.
SMALL_LOTLIP = ["--model", f"local-dir:{Path(__file__).parent / 'lotlip_small'}"]


def layout_flags(root: Path, sizes: str = "8,12") -> list[str]:
    """Returns the flags for all four benchmarks in a folder with the layout of tests/reference/layouts."""
    return [
        f"--dci-retrieval={root / 'dci'}",
        f"--iiw-retrieval={root / 'iiw'}",
        f"--iiw-anno={root / 'iiw_annotations'}",
        f"--share4v-retrieval={root / 'share4v'}",
        f"--share4v-anno={root / 'share4v_sam.json'}",
        f"--share4v_val_num={sizes}",
        f"--urban1k-retrieval={root / 'urban1k'}",
    ]


def free_ports(count: int) -> list[int]:
    """Returns different ports that are free now, below the range from which systems choose ports."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(15_000, 32_000), 1_000):
        try:
            socket.create_server(("localhost", port)).close()
        except OSError:
            continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports


def run_command(
    module: str, argv: list[str], num_processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess:
    """Runs ``python -m MODULE ARGV`` as a user would; under torchrun if there is more than one process."""
    launcher = [sys.executable, "-m"]
    if num_processes > 1:
        ranks = ["--nproc_per_node", str(num_processes), "--master_port", str(free_ports(1)[0])]
        launcher += ["torch.distributed.run", *ranks, "-m", "--"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(launcher + [module, *argv], capture_output=True, text=True, timeout=timeout, env=env)


def start_ranks(function: Callable, num_processes: int, *args: object) -> list[mp.Process]:
    """Starts function(rank, *args) in processes.

    They are forked from a process that has imported everything for training, because starting Python and torch takes
    longer than most tests.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    # The server ignores this process's sys.path before Python 3.13.
    search = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=search):
        forkserver.ensure_running()
    ranks = [context.Process(target=_begin, args=(function, rank, *args)) for rank in range(num_processes)]
    for rank in ranks:
        rank.start()
    return ranks


def _begin(function: Callable, rank: int, *args: object) -> None:
    mp.set_start_method(None, force=True)  # otherwise its own children would be started by a server without imports
    function(rank, *args)


def end_ranks(ranks: list[mp.Process], timeout: float = 240) -> list[int | None]:
    """Returns exit codes; None for a process that was still running after `timeout` seconds and was killed."""
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def run_ranks(argv: list[str], num_processes: int, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs ``python -m training.main ARGV`` as torchrun would, but without torchrun: see `start_ranks`.

    Returns:
        The largest exit code, and the output of all ranks.
    """
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory() as folder:
        codes = end_ranks(start_ranks(_rank_of_main, num_processes, argv, num_processes, port, folder), timeout)
        assert None not in codes, f"still running after {timeout} s: {codes}"
        said = ["".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{name}"))) for name in ("out", "err")]
    return subprocess.CompletedProcess(argv, max(codes, key=abs), *said)


def set_rank(rank: int, world_size: int, port: int) -> None:
    """Sets the environment variables that torchrun sets."""
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def _rank_of_main(rank: int, argv: list[str], world_size: int, port: int, folder: str) -> None:
    from training.main import main

    speak_to_files(rank, folder)
    if world_size > 1:
        set_rank(rank, world_size, port)
    sys.exit(main(argv))


def speak_to_files(rank: int, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)


def read_results(logs: Path, name: str) -> dict:
    """Returns the last line of a run's results.jsonl."""
    return json.loads((logs / name / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])


def evaluate(folder: Path, model: str, *flags: object, name: str = "run") -> dict:
    """Runs an evaluation in this process; returns its record."""
    from training.main import main

    common = ["--model", model, "--logs", str(folder / "logs"), "--name", name, "--workers", "0", "--device", "cpu"]
    assert main([*map(str, flags), *common]) == 0
    return read_results(folder / "logs", name)


class LabReport(NamedTuple):
    """The result of trainings: exit codes by training and rank (negative for a signal), and their output."""

    codes: list[list[int]]
    said: str


def run_lab(argv: list[str], world_size: int, samples: Path, kills: Sequence = (), last: bool = True) -> LabReport:
    """Runs one training after another, and kills all except the last: see crash_lab.py."""
    samples.mkdir(exist_ok=True)
    job = {"argv": argv, "world_size": world_size, "ports": free_ports(len(kills) + 1), "samples": str(samples)}
    with tempfile.TemporaryDirectory() as folder:
        lab = start_ranks(_lab, 1, job | {"kills": list(kills), "last": last}, folder)
        codes, said = end_ranks(lab, 400), Path(folder, "0.err").read_text()
        assert codes == [0], said[-3000:]
        return LabReport(json.loads(Path(folder, "0.out").read_text().splitlines()[-1]), said)


def _lab(rank: int, job: dict, folder: str) -> None:
    from crash_lab import run_job

    speak_to_files(rank, folder)
    run_job(job)
