"""What all commands share: complete files or none, worker processes, and the division of work among jobs."""

import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from tqdm import tqdm

from training.runtime.files import atomic_write
from training.runtime.processes import PROGRESS, starting_processes

T = TypeVar("T")
R = TypeVar("R")
SETTINGS = "settings.json"
SUMMARY = "_summary.json"  # readers of folders of Parquet pass over names that begin with an underscore


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file; an interrupted call leaves no partial file."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the file doesn't exist or is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_summary(args: Namespace, counts: Mapping) -> None:
    """Writes the counts to the file that --summary names, if it names one."""
    if args.summary:
        write_json(Path(args.summary), counts)


def start_folder(args: Namespace, state: str, settings: dict, may_hold_others: bool = False) -> Path:
    """Takes the lease of --out, and notes what its content is made from.

    Args:
        args: the parsed flags, of which --out and the lease are used.
        state: name of the folder in --out for notes.
        settings: what the content depends on.
        may_hold_others: other files may be in --out before.

    Returns:
        The folder for notes.

    Raises:
        ValueError: the folder was made with other settings, holds other files, or another command writes to it.
    """
    out, folder = Path(args.out), Path(args.out) / state
    is_new = not (folder / SETTINGS).exists()
    if is_new and not may_hold_others and out.is_dir() and any(path != folder for path in out.iterdir()):
        raise ValueError(f"--out {out}: holds something else; name an empty or new folder")
    note_settings(out, folder, settings)
    args.lease.take(folder, "--out")
    for path in [*out.glob("*.tmp"), *folder.glob("*.tmp")]:  # of runs that were killed
        path.unlink(missing_ok=True)
    return folder


def note_settings(out: Path, folder: Path, settings: dict) -> None:
    """Notes in `folder` what the content of --out is made from; raises ValueError if it is made from something else."""
    settings = json.loads(json.dumps(settings))  # tuples become lists
    if load_json(folder / SETTINGS) not in ({}, settings):
        raise ValueError(f"--out {out}: made from other tables or with other flags; name another folder")
    write_json(folder / SETTINGS, settings)


def hash_text(text: str) -> int:
    """Returns a 64-bit hash of a URL or key.

    For 100 million different URLs, the probability that any two have the same hash is 3 in 10,000.
    """
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


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


def shorten(names: Sequence[str]) -> str:
    """Returns the first names of a list, for a message."""
    return ", ".join([*names[:5], ".."] if len(names) > 5 else names)


def _end_with_parent() -> None:
    """Lets a worker process end when the process that started it ends, even if that was killed."""
    if parent := parent_process():
        Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()  # type: ignore[func-returns-value]


@contextmanager
def processes(workers: int) -> Iterator[Callable]:
    """Starts worker processes; one worker is the current process.

    Yields:
        A function (function, items, their number or None, what is done, name of an item) -> results in any order, which
        shows the progress. The called function must be at the top level of a module, so that it can be sent to
        processes. Items are taken from the iterable only when workers need them, so there may be any number of large
        ones.
    """
    if workers == 1:
        yield lambda function, items, *shown: progress(map(function, items), *shown)
        return
    with starting_processes("work in this process: --workers 1"):
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent)

    def results(function: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
        waiting = {pool.submit(function, item) for item in islice(items, workers + 2)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(function, item) for item in islice(items, len(done))}
            yield from (future.result() for future in done)

    try:
        yield lambda function, items, *shown: progress(results(function, iter(items)), *shown)
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable[T], total: int | None, what: str, unit: str) -> Iterator[T]:
    """Yields the items; shows a progress bar for work of more than 2 seconds."""
    for item in tqdm(items, what, total, unit=unit, delay=2):
        PROGRESS.add()
        yield item


def items_of_job(items: Sequence[T], span: str | None, environ: Mapping[str, str]) -> list[T]:
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
        if not colon or not all(word.isdecimal() or not word for word in (first, last)):
            raise ValueError(f"--shard-range {span}: expected A:B for the shards number A to B - 1, e.g. 0:100")
        items = items[int(first or 0) : int(last) if last else None]
    job, num_jobs = job_place(environ)
    if job < num_jobs:
        return list(items[job::num_jobs])
    # The numbers of an array have gaps, such as --array=3,17,20, so no task knows which are missing. Each takes all
    # items, beginning elsewhere, and passes over those that another has done by then.
    start = int(len(items) * ((job - num_jobs) * 0.618034 % 1))  # far from the others, whatever their numbers
    return [*items[start:], *items[:start]]


def job_place(environ: Mapping[str, str]) -> tuple[int, int]:
    """Returns (number of this job, number of jobs), from SLURM's array and step or from torchrun's ranks.

    The number of a task of an array with gaps is not below the number of jobs.
    """

    def number(*names: str) -> int:
        return int(next((environ[name] for name in names if environ.get(name, "").isdecimal()), 0))

    job, num_jobs, has_gaps = 0, number("SLURM_ARRAY_TASK_COUNT") or 1, False
    if num_jobs > 1:
        step, least = number("SLURM_ARRAY_TASK_STEP") or 1, number("SLURM_ARRAY_TASK_MIN")
        job = (number("SLURM_ARRAY_TASK_ID") - least) // step
        has_gaps = number("SLURM_ARRAY_TASK_MAX") > least + (num_jobs - 1) * step
    # The tasks of srun's step, not of the job: a batch script that starts one process may have many tasks.
    ranks = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    if ranks > 1:
        job, num_jobs = job * ranks + number("RANK", "SLURM_PROCID"), num_jobs * ranks
    return job + num_jobs * has_gaps, num_jobs
