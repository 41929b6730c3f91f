"""Runs commands as whole processes; measures seconds and peak memory, and reads numbers from their output."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.1


@dataclass(frozen=True)
class Side:
    """One tool's command.

    Attributes:
        command: program and arguments.
        read: function from standard output and error to the numbers in it (recalls, samples/s); may return none.
        cleanup: function called before each repetition, for commands that refuse to overwrite their output.
    """

    command: Sequence[str]
    read: Callable[[str], dict[str, float]] = lambda text: {}
    cleanup: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Measured:
    """All repetitions of one side.

    Attributes:
        seconds, peak_bytes: one value per repetition. Memory is the sum of the resident sets of the process and its
            children, so pages shared by several processes are counted several times.
        numbers: the result of `Side.read` in the last repetition.
    """

    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    numbers: dict[str, float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_bytes(self) -> float:
        return statistics.median(self.peak_bytes)


def run_interleaved(sides: Mapping[str, Side], repeats: int, threads: int, folder: Path) -> dict[str, Measured]:
    """Runs all sides `repeats` times in turns, so that other load on the machine affects them alike.

    Args:
        sides: name -> side.
        repeats: number of repetitions.
        threads: OMP_NUM_THREADS of the commands.
        folder: folder for their output.

    Raises:
        RuntimeError: a command failed; the message ends with its output.
    """
    seconds, memory = {name: [] for name in sides}, {name: [] for name in sides}
    numbers = {}
    for _ in range(repeats):
        for name, side in sides.items():
            side.cleanup()
            took, peak, text = _run(side.command, threads, folder / f"{name}.log")
            seconds[name].append(took)
            memory[name].append(peak)
            numbers[name] = side.read(text)
    return {name: Measured(tuple(seconds[name]), tuple(memory[name]), numbers[name]) for name in sides}


def _run(command: Sequence[str], threads: int, log: Path) -> tuple[float, int, str]:
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start, peak = time.perf_counter(), 0
    with open(log, "w", encoding="utf-8") as file:
        process = psutil.Popen([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(POLL_S)
    took, text = time.perf_counter() - start, log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{text[-2000:]}")
    return took, peak, text


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the two calls
            continue
    return total
