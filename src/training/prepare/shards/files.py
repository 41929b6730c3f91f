"""Shards on disk: which of them this job has to write, what their JSON files hold, and how they are rewritten.

A rewritten shard has the same members, byte for byte and in the same order, except for JSON files that were changed or
added.
"""

import argparse
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

from training.data.sizes import expand_sources
from training.prepare.work import add_counts, job_place, load_json, my_share, write_json
from training.readers.captions import RecordError, read_record
from training.readers.files import parallel_map
from training.readers.samples import RawSample, read_samples
from training.readers.streams import is_local
from training.readers.tar import BLOCK, Member, TarReader
from training.runtime.files import atomic_write


class JsonSample(NamedTuple):
    """A sample without its image.

    Attributes:
        key: name within the shard.
        record: content of its JSON file; empty if there is none.
        fault: why the JSON file can't be used; None if it can.
    """

    key: str
    record: dict
    fault: str | None


@dataclass(frozen=True)
class Place:
    """Where one shard is read and where it is written.

    Attributes:
        source: the shard.
        target: the shard to write, which may be the same.
        state: folder for notes about shards that are done.
    """

    source: Path
    target: Path
    state: Path

    @property
    def note(self) -> Path:
        """The note which says that the target is complete, and what it holds."""
        return self.state / f"{self.source.name}.json"


def local_shards(spec: str, flag: str) -> list[Path]:
    """Expands the value of a flag to files on disk, with the syntax of `--train-data`.

    Raises:
        FileNotFoundError, ValueError: some shards are missing, there are none, or they are not on a disk.
    """
    urls = [url for source in expand_sources(spec) for url in source]
    remote = [url for url in urls if not is_local(url)]
    if remote:
        raise ValueError(f"{flag} {remote[0]}: expected files on a local or mounted disk; copy the shards first")
    return [Path(url) for url in urls]


def places(shards: list[Path], out: str | None, state: str) -> list[Place]:
    """Decides where each shard goes.

    Args:
        shards: all shards.
        out: folder to write to; None overwrites each shard.
        state: name of the folder for notes, beside the shards that are written.

    Raises:
        ValueError: two shards would be written under the same name, or `out` is the folder of a shard.
    """
    if out is None:
        return [Place(path, path.resolve(), path.parent / state) for path in shards]  # links stay links
    seen: dict[str, Path] = {}
    for path in shards:
        if path.name in seen:
            raise ValueError(f"--out {out}: {seen[path.name]} and {path} have the same name; do one folder at a time")
        seen[path.name] = path
        if Path(out).resolve() == path.parent.resolve():
            raise ValueError(f"--out {out}: this is the folder of the shards; use --in-place to overwrite them")
    return [Place(path, Path(out) / path.name, Path(out) / state) for path in shards]


def done_counts(place: Place, mark: str) -> dict | None:
    """Returns the counts in the note about a shard that the same command has written; None if it has not."""
    note = load_json(place.note)
    if not isinstance(note, dict) or note.get("fingerprint") != mark or not place.target.exists():
        return None
    return note.get("counts") if note.get("bytes") == os.path.getsize(place.target) else None


def my_places(args: argparse.Namespace, spec: str, flag: str, state: str) -> tuple[list[Place], list[Place]]:
    """Returns (all shards, the shards of this job), by --out, --in-place, --shard-range and the environment.

    Raises:
        FileNotFoundError, ValueError: another live command works on the same shards; see also `local_shards`,
            `places` and `my_share`.
    """
    everything = places(local_shards(spec, flag), None if args.in_place else args.out, state)
    mine = my_share(everything, args.shard_range, os.environ)
    place, parts = job_place(os.environ)
    jobs = everything[0].target.parent / ".jobs"
    args.lease.take(jobs / f"{(args.shard_range or 'all').replace(':', '-')}-{place}-of-{parts}", "--out or --in-place")
    return everything, mine


def check_sources(args: argparse.Namespace, everything: list[Place], tables: Sequence[Path] = ()) -> None:
    """Notes in the folder of --out which shards and tables it is made from.

    Raises:
        ValueError: the folder was made from others, or holds shards that this command did not write.
    """
    if args.in_place:
        return
    path = everything[0].state / "sources.json"
    known = load_json(path) or {"shards": {}, "tables": None}
    names = [place.source.name for place in everything]
    shards = dict(zip(names, parallel_map(content_mark, [place.source for place in everything])))
    made_from = sorted(map(content_mark, tables))
    for place in everything:
        name = place.source.name
        if known["shards"].get(name, shards[name]) != shards[name]:
            raise ValueError(
                f"--out {args.out}: its {name} is made from another shard than {place.source}; name another"
            )
        if name not in known["shards"] and place.target.exists():
            raise ValueError(f"--out {args.out}: holds {name}, which this command did not write; name another folder")
    if known["tables"] not in (None, made_from):
        raise ValueError(f"--out {args.out}: made from other tables; name another folder")
    write_json(path, {"shards": known["shards"] | shards, "tables": made_from})


def content_mark(path: Path) -> str:
    """Returns a text that differs between files of different content: their size, and a hash of both their ends."""
    size, digest = os.path.getsize(path), blake2b(digest_size=12)
    with open(path, "rb") as file:
        digest.update(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


def not_done(mine: list[Place], mark: str, total: dict) -> list[Place]:
    """Returns the shards that are not done yet; adds the counts of the others to `total`."""
    done = [done_counts(place, mark) for place in mine]
    for counts in done:
        add_counts(total, counts or {})
    return [place for place, counts in zip(mine, done) if counts is None]


def finish(args: argparse.Namespace, everything: list[Place], summary: dict, lines: list[str]) -> int:
    """Writes sizes and summary, and prints the counts.

    Args:
        args: the parsed flags, of which --out, --in-place and --summary are used.
        everything: all shards.
        summary: counts, with ``shards``, ``done_before`` and ``broken_shards``.
        lines: lines to print between the number of shards and the list of broken ones.

    Returns:
        Exit code: 0, or 1 if shards can't be read.
    """
    if not args.in_place:
        write_sizes(Path(args.out), everything[0].state)
    if args.summary:
        write_json(Path(args.summary), summary)
    share = "" if summary["shards"] == len(everything) else f" of {len(everything):,}"
    before = f", {summary['done_before']:,} of them before" if summary["done_before"] else ""
    broken = [f"not done: {reason}" for reason in summary["broken_shards"].values()]
    left = [place.source.name for place in everything if not place.note.exists()]
    if left and not broken:
        lines = [*lines, f"left to other jobs: {len(left):,} shards ({', '.join(left[:5])}{', ..' * (len(left) > 5)})"]
    print("\n".join([f"{summary['shards']:,}{share} shards{before}", *lines, *broken]))
    return 1 if broken else 0


def fingerprint(settings: dict) -> str:
    """Returns a hash of the settings that a result depends on."""
    return blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_note(place: Place, mark: str, counts: Mapping) -> None:
    """Writes the note that a shard is complete."""
    content = {"fingerprint": mark, "bytes": os.path.getsize(place.target), "counts": dict(counts)}
    write_json(place.note, content)


def write_sizes(folder: Path, state: Path) -> None:
    """Writes ``sizes.json`` from the notes about all shards written so far."""
    notes = {path.name.removesuffix(".json"): load_json(path) for path in sorted(state.glob("*.tar.json"))}
    sizes = {name: note["counts"]["samples"] for name, note in notes.items() if isinstance(note, dict)}
    write_json(folder / "sizes.json", {name: size for name, size in sizes.items() if (folder / name).exists()})


def read_json_samples(path: Path) -> list[JsonSample]:
    """Reads the JSON files of a shard; images are skipped without reading them.

    Raises:
        BrokenShardError: the shard is broken, not a tar file, or can't be read.
    """
    return [JsonSample(raw.key, *_record(raw)) for raw in read_samples(str(path), load=("json",), waits=())]


def _record(raw: RawSample) -> tuple[dict, str | None]:
    if raw.fault:
        return {}, raw.fault
    try:
        return read_record(raw.files), None
    except RecordError as error:
        return {}, str(error)


def rewrite_shard(source: Path, target: Path, additions: list[dict]) -> None:
    """Writes a shard with additional entries in its JSON files.

    Args:
        source: the shard.
        target: path of the new shard, which appears there when it is complete; may be the source.
        additions: for each sample, in order, the entries to add; an empty dict leaves the sample unchanged.

    Raises:
        BrokenShardError: the source is broken, not a tar file, or can't be read.
        OSError: the target can't be written.
    """
    with atomic_write(target) as path, open(path, "wb") as out, open(source, "rb") as raw:
        # Byte where a JSON file begins -> its new content; byte where a sample's last member begins -> a new JSON file.
        changed, added = {}, {}
        samples = read_samples(str(source), load=("json",), waits=())
        for sample, addition in zip(samples, additions, strict=True):
            if addition and "json" in sample.files:
                changed[sample.members.members["json"].start] = read_record(sample.files) | addition
            elif addition:
                last = max(member.start for member in sample.members.members.values())
                added[last] = tarfile.TarInfo(f"{sample.members.key}.json"), addition
        for member in filter(None, TarReader(raw, str(source), os.path.getsize(source)).members()):
            if member.start in changed:
                _write_member(_header(member, raw), changed[member.start], out)
            else:
                raw.seek(member.start)
                out.write(raw.read(member.end - member.start))
            if member.start in added:
                _write_member(*added[member.start], out)
        out.write(bytes(2 * BLOCK))
        out.write(bytes(-out.tell() % tarfile.RECORDSIZE))


def _header(member: Member, raw: IO[bytes]) -> tarfile.TarInfo:
    """Returns the member's own header, to keep owner, time and mode."""
    raw.seek(member.offset - BLOCK)
    header = tarfile.TarInfo.frombuf(raw.read(BLOCK), "utf-8", "surrogateescape")
    header.name = member.name
    return header


def _write_member(header: tarfile.TarInfo, record: dict, out: IO[bytes]) -> None:
    content = json.dumps(record).encode()
    header.size, header.mtime = len(content), int(header.mtime)
    out.write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    out.write(content)
    out.write(bytes(-len(content) % BLOCK))
