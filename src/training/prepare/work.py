"""What all commands share: complete files or none, worker processes, and the division of work among jobs."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

from tqdm import tqdm

from training.runtime.files import atomic_write
from training.runtime.progress import PROGRESS

T = TypeVar("T")
R = TypeVar("R")


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file; an interrupted call leaves no partial file."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> object | None:
    """Returns the content of a JSON file; None if it doesn't exist or is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove_leftovers(folder: Path) -> None:
    """Removes partial files that killed runs left in a folder. No other job may be writing to that folder."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def add_counts(total: dict, more: Mapping) -> None:
    """Adds the numbers in `more`, also those in nested mappings, to the numbers in `total` under the same keys."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add_counts(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def format_counts(counts: Mapping[str, int]) -> str:
    """Returns, for example, ``12 matched, 3 unmatched``; zeros are left out."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number) or "none"


class WorkerPool(ProcessPoolExecutor):
    """Worker processes that end when the process that started them ends, even if it was killed.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int):
        super().__init__(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
        self.workers = workers


def _end_with_parent() -> None:
    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def processes(workers: int) -> Iterator[WorkerPool | None]:
    """Starts worker processes for `spread`; for one worker yields None, which means the current process."""
    if workers == 1:
        yield None
        return
    with WorkerPool(workers) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def spread(function: Callable[[T], R], items: Iterable[T], pool: WorkerPool | None) -> Iterator[R]:
    """Applies a function in worker processes; yields results as they become ready, in any order.

    Items are taken from the iterable only when workers need them, so there may be any number of large ones.

    Args:
        function: a function at the top level of a module, so that it can be sent to processes.
        items: the arguments of its calls.
        pool: the pool that `processes` yields.
    """
    if pool is None:
        yield from map(function, items)
        return
    items = iter(items)
    waiting = {pool.submit(function, item) for item in islice(items, pool.workers + 2)}
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        waiting |= {pool.submit(function, item) for item in islice(items, len(done))}
        for future in done:
            yield future.result()


def progress(items: Iterable[T] | None, total: int | None, what: str, unit: str, scaled: bool = False) -> tqdm:
    """Shows a progress bar for work of more than 2 seconds; without items, the caller calls its `update`."""
    return _Bar(items, total=total, desc=what, unit=unit, delay=2, unit_scale=scaled)


class _Bar(tqdm):
    def __iter__(self) -> Iterator:
        for item in super().__iter__():
            PROGRESS.add()
            yield item

    def update(self, n: float = 1) -> bool | None:
        PROGRESS.add()
        return super().update(n)


def my_share(items: Sequence[T], span: str | None, environ: Mapping[str, str]) -> list[T]:
    """Returns the items that this job has to do; all jobs together do each item once.

    Args:
        items: all items.
        span: ``A:B`` for only the items number A to B - 1; None means all.
        environ: environment variables of SLURM or torchrun; items are divided among the jobs of an array, and among
            the processes of a job.

    Raises:
        ValueError: `span` has another form.
    """
    if span:
        first, colon, last = span.partition(":")
        if not colon or not all(part.isdecimal() or not part for part in (first, last)):
            raise ValueError(f"--shard-range {span}: expected A:B for the shards number A to B - 1, e.g. 0:100")
        items = items[int(first or 0) : int(last) if last else None]
    place, parts = job_place(environ)
    if place < parts:
        return list(items[place::parts])
    # The numbers of an array have gaps, such as --array=3,17,20, so no task knows which are missing. Each takes all
    # items, beginning elsewhere, and passes over those that another has done by then.
    start = int(len(items) * ((place - parts) * 0.618034 % 1))  # far from the others, whatever their numbers
    return [*items[start:], *items[:start]]


def job_place(environ: Mapping[str, str]) -> tuple[int, int]:
    """Returns (number of this job, number of jobs), from SLURM's array and step or from torchrun's ranks.

    The number of a task of an array with gaps is not below the number of jobs.
    """

    def number(*names: str) -> int:
        return int(next((environ[name] for name in names if environ.get(name, "").isdecimal()), 0))

    place, parts, has_gaps = 0, 1, False
    if number("SLURM_ARRAY_TASK_COUNT") > 1:
        step, least = number("SLURM_ARRAY_TASK_STEP") or 1, number("SLURM_ARRAY_TASK_MIN")
        place = (number("SLURM_ARRAY_TASK_ID") - least) // step
        parts = number("SLURM_ARRAY_TASK_COUNT")
        has_gaps = number("SLURM_ARRAY_TASK_MAX") > least + (parts - 1) * step
    # The tasks of srun's step, not of the job: a batch script that starts one process may have many tasks.
    ranks = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    if ranks > 1:
        place, parts = place * ranks + number("RANK", "SLURM_PROCID"), parts * ranks
    return place + parts * has_gaps, parts
