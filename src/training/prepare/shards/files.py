"""Shards on disk: which of them are ours to do, what their samples are called, and writing them anew.

A rewritten shard has the same members, byte for byte and in the same order, but for JSON files whose content changes
or that are added.
"""

import argparse
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

from dataloaders.tar import BLOCK, BrokenTarError, Member, TarReader, TarSample, is_local
from training.data.shards import expand_sources
from training.prepare.work import add_counts, load_json, my_share, write_json
from training.runtime.files import whole_file

BROKEN_JSON, NO_OBJECT = "broken JSON", "JSON not an object"


class BrokenShardFile(ValueError):
    """A shard that can't be read to its end; the message says where it breaks off."""


class JsonSample(NamedTuple):
    """A sample without its image.

    Attributes:
        key: name within the shard.
        record: content of its JSON file; empty if it has none.
        fault: why the JSON can't be used; None if it can.
    """

    key: str
    record: dict
    fault: str | None


@dataclass(frozen=True)
class Place:
    """Where one shard comes from and goes to.

    Attributes:
        source: the shard.
        target: the shard to write, which may be the same.
        state: folder for notes about what is done.
    """

    source: Path
    target: Path
    state: Path

    @property
    def note(self) -> Path:
        """The note that says that the target is whole, and what is in it."""
        return self.state / f"{self.target.name}.json"


def local_shards(spec: str, flag: str) -> list[Path]:
    """Expands what a flag names, as `--train-data` does, to files on disk.

    Raises:
        FileNotFoundError, ValueError: shards are missing, none are there, or they are not on a disk.
    """
    urls = [url for source in expand_sources(spec) for url in source]
    remote = [url for url in urls if not is_local(url)]
    if remote:
        raise ValueError(f"{flag} {remote[0]}: expected files on a local or mounted disk; copy the shards first")
    return [Path(url) for url in urls]


def places(shards: list[Path], out: str | None, state: str) -> list[Place]:
    """Decides where each shard goes.

    Args:
        shards: all of them.
        out: folder to write to; None writes each in its own place.
        state: name of the folder for notes, beside the shards that are written.

    Raises:
        ValueError: two shards would be written under one name, or over themselves.
    """
    if out is None:
        return [Place(path, path, path.parent / state) for path in shards]
    seen: dict[str, Path] = {}
    for path in shards:
        if path.name in seen:
            raise ValueError(f"--out {out}: {seen[path.name]} and {path} have the same name; do one folder at a time")
        seen[path.name] = path
        if Path(out).resolve() == path.parent.resolve():
            raise ValueError(f"--out {out}: the shards lie there themselves; add --in-place to write over them")
    return [Place(path, Path(out) / path.name, Path(out) / state) for path in shards]


def done_counts(place: Place, mark: str) -> dict | None:
    """What a note says about a shard written by the same command; None if it is to be written yet."""
    note = load_json(place.note)
    if not isinstance(note, dict) or note.get("fingerprint") != mark or not place.target.exists():
        return None
    return note.get("counts") if note.get("bytes") == os.path.getsize(place.target) else None


def my_places(args: argparse.Namespace, spec: str, flag: str, state: str) -> tuple[list[Place], list[Place]]:
    """Returns (all shards, those that this job has to do), by --out, --in-place, --shard-range and the environment.

    Raises:
        FileNotFoundError, ValueError: as `local_shards`, `places` and `my_share`.
    """
    everything = places(local_shards(spec, flag), None if args.in_place else args.out, state)
    return everything, my_share(everything, args.shard_range, os.environ)


def not_done(mine: list[Place], mark: str, total: dict) -> list[Place]:
    """Returns what is left to do; adds the counts of what is done."""
    done = [done_counts(place, mark) for place in mine]
    for counts in done:
        add_counts(total, counts or {})
    return [place for place, counts in zip(mine, done) if counts is None]


def finish(args: argparse.Namespace, everything: list[Place], summary: dict, lines: list[str]) -> int:
    """Writes sizes and summary, prints what was done.

    Args:
        args: --out, --in-place, --summary.
        everything: all shards.
        summary: counts, with ``shards``, ``done_before`` and ``broken_shards``.
        lines: what to print between the number of shards and those that were not done.

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
    print("\n".join([f"{summary['shards']:,}{share} shards{before}", *lines, *broken]))
    return 1 if broken else 0


def fingerprint(settings: dict) -> str:
    """A short name for everything that a result depends on."""
    return blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_note(place: Place, mark: str, counts: Mapping) -> None:
    """Notes that a shard is whole."""
    content = {"fingerprint": mark, "bytes": os.path.getsize(place.target), "counts": dict(counts)}
    write_json(place.note, content)


def write_sizes(folder: Path, state: Path) -> None:
    """Writes ``sizes.json`` from the notes about all shards that are there so far."""
    notes = {path.name.removesuffix(".json"): load_json(path) for path in sorted(state.glob("*.tar.json"))}
    sizes = {name: note["counts"]["samples"] for name, note in notes.items() if isinstance(note, dict)}
    write_json(folder / "sizes.json", {name: size for name, size in sizes.items() if (folder / name).exists()})


def _parse(key: str, content: bytes | None) -> JsonSample:
    if content is None:
        return JsonSample(key, {}, None)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return JsonSample(key, {}, BROKEN_JSON)
    return JsonSample(key, record, None) if isinstance(record, dict) else JsonSample(key, {}, NO_OBJECT)


def read_json_samples(path: Path) -> list[JsonSample]:
    """Reads the JSON files of a shard; images are passed over without reading them.

    Raises:
        BrokenShardFile: the shard breaks off, or is no tar file.
        OSError: can't be read.
    """
    with open(path, "rb", buffering=1 << 16) as file:
        return [_parse(sample.key, sample.loaded.get("json")) for sample in _samples(file, path)]


def _samples(file: IO[bytes], path: Path) -> list[TarSample]:
    """All samples of a shard, with the content of their JSON files."""
    tar = TarReader(file, str(path))

    def load(_: int, suffix: str, member: Member) -> bytes | None:
        return tar.read(member) if suffix == "json" and member.kind == "file" else None

    try:
        return list(tar.samples(load))
    except BrokenTarError as error:
        raise BrokenShardFile(str(error)) from error


def rewrite_shard(source: Path, target: Path, additions: list[dict]) -> None:
    """Writes a shard with more in its JSON files.

    Args:
        source: the shard.
        target: where the new one goes, once it is whole; may be the source.
        additions: per sample, in order, what to put under which keys; an empty one leaves the sample as it is.

    Raises:
        BrokenShardFile: the source breaks off, or is no tar file.
        OSError: can't be read or written.
    """
    with whole_file(target) as path, open(path, "wb") as out, open(source, "rb") as raw:
        samples = _samples(raw, source)
        assert len(samples) == len(additions), f"{source}: {len(samples)} samples, {len(additions)} additions"
        changed, added = {}, {}  # byte where a JSON file begins, or where the last member does -> the new JSON file
        for sample, addition in zip(samples, additions):
            if "json" in sample.loaded:
                record = json.loads(sample.loaded["json"]) | addition if addition else None
                changed[sample.members["json"].start] = record
            elif addition:
                last = max(member.start for member in sample.members.values())
                added[last] = tarfile.TarInfo(f"{sample.key}.json"), addition
        raw.seek(0)
        for member in filter(None, TarReader(raw, str(source)).members()):
            if changed.get(member.start):
                _write_member(_header(member, raw), changed[member.start], out)
            else:
                raw.seek(member.start)
                out.write(raw.read(member.end - member.start))
            if member.start in added:
                _write_member(*added[member.start], out)
            raw.seek(member.offset)  # where the reader left it
        out.write(bytes(2 * BLOCK))
        out.write(bytes(-out.tell() % tarfile.RECORDSIZE))


def _header(member: Member, raw: IO[bytes]) -> tarfile.TarInfo:
    """The member's own header, for its owner, time and mode."""
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
