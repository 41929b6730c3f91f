"""The part of a set of shards that one command writes: which shards are left, and what is noted about the others."""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from training.prepare import work
from training.prepare.shards import Shard, content_mark, find_shards
from training.readers.files import parallel_map

R = TypeVar("R")


class ShardJob:
    """The shards of `join` or `recaption`, by --out, --in-place, --shard-range and the environment.

    Args:
        args: the parsed flags.
        spec: the flag's value that names the shards.
        flag: that flag, for messages.
        state: name of the folder for notes, beside the shards that are written.

    Attributes:
        shards: all shards.
        mine: the shards of this job.
        name: a name that no other job of the same command has.
        total: the counts of all shards of this job that are done.

    Raises:
        FileNotFoundError, ValueError: another live command works on the same shards; see also `find_shards` and
            `items_of_job`.
    """

    def __init__(self, args: argparse.Namespace, spec: str, flag: str, state: str):
        self.args = args
        self.shards = find_shards(spec, flag, None if args.in_place else args.out, state)
        self.mine = work.items_of_job(self.shards, args.shard_range, os.environ)
        self.state, self.num_before, self.fingerprint = self.shards[0].state, 0, ""
        self.total: dict[str, Any] = {}
        self.broken: dict[str, str] = {}
        self.name = "{}-{}-of-{}".format((args.shard_range or "all").replace(":", "-"), *work.job_place(os.environ))
        args.lease.take(self.shards[0].target.parent / ".jobs" / self.name, "--out or --in-place")

    def left(self, settings: dict, total: dict) -> list[Shard]:
        """Returns the shards that are not done yet, and counts the others.

        Args:
            settings: what the result depends on.
            total: names of counts, each 0.

        Raises:
            ValueError: --out was made from other shards or with other settings, or holds shards that this command did
                not write.
        """
        self.fingerprint = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.total = total
        if not self.args.in_place:
            work.note_settings(Path(self.args.out), self.state, settings)
            parallel_map(self._begin, self.mine)
        left = [shard for shard in self.mine if not self._count_done(shard)]
        self.num_before = len(self.mine) - len(left)
        return left

    def _begin(self, shard: Shard) -> None:
        """Notes what a shard is made from; raises ValueError if the target is made from something else."""
        note, mark, name = work.load_json(shard.note), content_mark(shard.source), shard.target.name
        fault = ""
        if note and note.get("source", mark) != mark:
            fault = f"its {name} is made from another shard than {shard.source}"
        elif not note and shard.target.exists():
            fault = f"holds {name}, which this command did not write"
        if fault:
            raise ValueError(f"--out {self.args.out}: {fault}; name another folder")
        if not note:
            work.write_json(shard.note, {"source": mark})

    def _count_done(self, shard: Shard) -> bool:
        """Returns whether the same command has written a shard; adds its counts to the total if it has."""
        note = work.load_json(shard.note)
        if note.get("fingerprint") != self.fingerprint or not shard.target.exists():
            return False
        is_done = note["bytes"] == os.path.getsize(shard.target)
        work.add_counts(self.total, note["counts"] if is_done else {})
        return is_done

    def each(
        self, parallel: Callable, function: Callable[[Shard], R], shards: Sequence[Shard], what: str
    ) -> Iterator[tuple[Shard, R]]:
        """Yields (shard, function(shard)) in any order; shards that can't be read or written are kept for `finish`.

        Args:
            parallel: see `processes`.
            function: of a shard; picklable.
            shards: the shards; one that another job has written in the meantime is passed over.
            what: what is done, for the progress bar.
        """
        open_ones = (shard for shard in shards if not self._count_done(shard))
        for shard, result, fault in parallel(partial(_attempt, function), open_ones, len(shards), what, "shard"):
            if fault:
                self.broken[shard.source] = fault
            else:
                yield shard, result

    def write(self, parallel: Callable, function: Callable[[Shard], dict], shards: Sequence[Shard], what: str) -> None:
        """Calls `function`, which writes a shard and returns its counts, for each shard; notes those that are complete.

        See `each` for the arguments.
        """
        for shard, counts in self.each(parallel, function, shards, what):
            work.add_counts(self.total, counts)
            note = {"fingerprint": self.fingerprint, "bytes": os.path.getsize(shard.target), "counts": counts}
            work.write_json(shard.note, work.load_json(shard.note) | note)

    def finish(self, further: dict, lines: list[str]) -> int:
        """Writes sizes and summary, and prints the counts.

        Args:
            further: further entries of the summary.
            lines: lines to print between the number of shards and the list of broken ones.

        Returns:
            Exit code: 0, or 1 if shards can't be read.
        """
        if not self.args.in_place:
            out = Path(self.args.out)
            notes = {path.stem: work.load_json(path) for path in self.state.glob("*.tar.json")}
            done = {name: note["counts"]["samples"] for name, note in sorted(notes.items()) if "counts" in note}
            work.write_json(out / "sizes.json", {name: done[name] for name in done if (out / name).exists()})
        counts = {"shards": len(self.mine), "done_before": self.num_before, "broken_shards": self.broken}
        work.write_summary(self.args, counts | self.total | further)
        of_all = "" if len(self.mine) == len(self.shards) else f" of {len(self.shards):,}"
        before = f", {self.num_before:,} of them before" if self.num_before else ""
        broken = [f"not done: {reason}" for reason in self.broken.values()]
        others = [shard.target.name for shard in self.shards if "counts" not in work.load_json(shard.note)]
        if others and not broken:
            lines = [*lines, f"left to other jobs: {len(others):,} shards ({work.shorten(others)})"]
        print("\n".join([f"{len(self.mine):,}{of_all} shards{before}", *lines, *broken]))
        return 1 if broken else 0


def _attempt(function: Callable[[Shard], R], shard: Shard) -> tuple[Shard, R | None, str | None]:
    """Returns (shard, function(shard), None), or (shard, None, why it can't be read or written)."""
    try:
        return shard, function(shard), None
    except OSError as error:
        return shard, None, str(error)
