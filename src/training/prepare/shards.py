"""Shards as input and output: reads them wherever they are, and writes tar files.

A rewritten shard has the same members in the same order, with the same content, owner, time and mode, except for JSON
files that were changed or added. Compressed shards, URLs and folders of loose images are copied to a temporary tar
first.
"""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, cast

from training.data.sizes import expand_sources
from training.readers.captions import read_record
from training.readers.faults import BadSample
from training.readers.files import identity, is_leftover
from training.readers.samples import RawSample, read_samples
from training.readers.streams import BLOCK_BYTES, is_local, open_stream
from training.readers.table_files import image_files, local_spec
from training.readers.tar import key_and_suffix
from training.runtime.files import atomic_write
from training.runtime.messages import first_line


@dataclass(frozen=True)
class Shard:
    """A shard to read, and the one to write.

    Attributes:
        source: a tar file, its URL, or a folder of loose images and captions.
        target: the tar file to write, which may be the same.
        state: folder for notes about shards that are done.
    """

    source: str
    target: Path
    state: Path

    @property
    def note(self) -> Path:
        """The file which says that the target is complete, and what it holds."""
        return self.state / f"{self.target.name}.json"


def find_shards(spec: str, flag: str, out: str | None, state: str) -> list[Shard]:
    """Expands the value of a flag, with the syntax of `--train-data`, and decides where each shard goes.

    Args:
        spec: the value. In a folder without tar files, each folder that holds images counts as a shard.
        flag: the flag, for messages.
        out: folder to write to; None overwrites each shard.
        state: name of the folder for notes, beside the shards that are written.

    Raises:
        FileNotFoundError, ValueError: some shards are missing, there are none, two would be written under the same
            name, `out` is the folder of a shard, or a shard can't be overwritten.
    """
    names = local_spec(spec).split("::")
    shards: dict[str, Shard] = {}
    for source in (source for name in names for source in _loose_folders(name) or sum(expand_sources(name), [])):
        name = os.path.basename(source.rstrip("/") if is_local(source) else source.partition("?")[0])
        name = re.sub(r"(\.tar(\.\w+)?|\.tgz)?$", ".tar", name, count=1)
        if source.startswith("pipe:"):
            raise ValueError(f"{flag} {source}: a command has no name under which to write; name files or URLs")
        if out is None:
            if not is_local(source) or name != os.path.basename(source):
                raise ValueError(f"--in-place: {source} is not a plain tar file on a disk; write to another --out")
            path = Path(source)
            shards[source] = Shard(source, path.resolve(), path.parent / state)  # links stay links
            continue
        if name in shards:
            other = shards[name].source
            raise ValueError(f"--out {out}: {other} and {source} have the same name; do one folder at a time")
        if is_local(source) and Path(out).resolve() == Path(source).parent.resolve():
            raise ValueError(f"--out {out}: this is the folder of the shards; use --in-place to overwrite them")
        shards[name] = Shard(source, Path(out) / name, Path(out) / state)
    return list(shards.values())


def _loose_folders(name: str) -> list[str]:
    """Returns the folders with images in a folder without tar files, such as the one that img2dataset writes."""
    folder = Path(name)
    if not folder.is_dir() or any(re.search(r"\.(tar|tgz)\b", file) for file in os.listdir(folder)):
        return []
    return sorted({str(path.parent) for path in image_files(folder)})


def content_mark(source: str | Path) -> str:
    """Returns a text that differs between shards or tables of different content.

    It holds the size and a hash of both ends of a file, what a file system says of a URL, or a hash of the names and
    sizes in a folder.

    Raises:
        ValueError: a URL can't be reached.
    """
    source, digest = str(source), blake2b(digest_size=12)
    if not is_local(source):
        try:
            return " ".join(map(str, identity(source)))
        except Exception as error:  # each of fsspec's file systems has its own exceptions
            raise ValueError(f"{source}: can't be reached ({type(error).__name__}: {error})") from error
    if os.path.isdir(source):
        listed = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(source))
        digest.update(repr(listed).encode("utf-8", "surrogateescape"))
        return f"{len(listed)} files {digest.hexdigest()}"
    size = os.path.getsize(source)
    with open(source, "rb") as file:
        digest.update(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


@contextmanager
def plain_tar(shard: Shard) -> Iterator[Path]:
    """Yields a tar file on a disk with the shard's content: the shard itself, or a copy that is removed afterwards.

    Raises:
        OSError: the shard can't be read.
    """
    copy = shard.state / f"{shard.target.name}.source.tmp"
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield copy if _copy(shard.source, copy) else Path(shard.source)
    finally:
        copy.unlink(missing_ok=True)


def _copy(source: str, copy: Path) -> bool:
    """Unpacks or fetches a shard, or packs a folder; returns False for a plain tar file on a disk."""
    if os.path.isdir(source):
        files = (path for path in sorted(Path(source).iterdir()) if path.is_file() and not is_leftover(path.name))
        write_tar(copy, ((path.name, path.stat().st_size, open(path, "rb")) for path in files))
        return True
    try:
        stream, size = open_stream(source)
        with closing(stream):
            if is_local(source) and size is not None:
                return False
            with open(copy, "wb") as file:
                shutil.copyfileobj(stream, file, BLOCK_BYTES)
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        raise OSError(f"{source}: can't be read ({type(error).__name__}: {first_line(error)})") from error
    return True


def read_json_samples(path: Path) -> list[RawSample]:
    """Reads the samples of a plain tar file, with their JSON as `record`; images are skipped without reading them.

    Raises:
        BrokenShardError: the shard is broken, not a tar file, or can't be read.
    """
    samples = []
    for raw in read_samples(str(path), load=("json",), waits=()):
        try:
            record, fault = {} if raw.fault else read_record(raw.files), raw.fault
        except BadSample as error:
            record, fault = {}, error.kind
        samples.append(replace(raw, record=record, fault=fault, files={}))
    return samples


def rewrite_shard(source: Path, target: Path, samples: list[RawSample], additions: list[dict]) -> None:
    """Writes a shard with additional entries in its JSON files.

    Args:
        source: the shard, a plain tar file.
        target: path of the new shard, which appears there when it is complete; may be the source.
        samples: its samples.
        additions: for each sample the entries to add; an empty dict leaves the sample unchanged.

    Raises:
        OSError: the target can't be written.
    """
    records: dict[int, dict] = {}  # where a member begins -> content of the JSON file that replaces or follows it
    for sample, addition in zip(samples, additions, strict=True):
        if addition:
            last = max(sample.members.values(), key=lambda member: member.start)
            records[sample.members.get("json", last).start] = sample.record | addition
    with atomic_write(target) as path, _new_tar(path) as new, tarfile.open(source, ignore_zeros=True) as old:
        for member in old:
            record, (key, suffix) = records.get(member.offset), key_and_suffix(member.name)
            if record is None or suffix != "json":
                stream = old.extractfile(member) if member.isreg() else None
                member.type = tarfile.REGTYPE if member.issparse() else member.type  # its holes are written as zeros
                new.addfile(member, stream)
            if record is not None:
                header, content = member if suffix == "json" else tarfile.TarInfo(f"{key}.json"), json.dumps(record)
                header.size = len(content)
                new.addfile(header, io.BytesIO(content.encode()))


def _new_tar(path: Path) -> tarfile.TarFile:
    # The stub of tarfile lacks this argument, which only sets how many bytes are copied at a time.
    return tarfile.open(path, "w", format=tarfile.GNU_FORMAT, copybufsize=BLOCK_BYTES)  # type: ignore[call-overload]


def write_tar(target: Path, files: Iterable[tuple[str, int, IO[bytes]]]) -> None:
    """Writes a tar file without times and owners, so that the same files give the same bytes.

    Args:
        target: the file to write.
        files: (name, size, stream) of each, in order; the streams are closed.
    """
    with atomic_write(target) as temporary, _new_tar(temporary) as tar:
        for name, size, stream in files:
            plain = tarfile.TarInfo(name)
            plain.size = size
            with stream:
                tar.addfile(plain, stream)


def order_shard(path: Path) -> bool:
    """Sorts the samples of a complete shard by key, and removes times and owners; contents are unchanged.

    Returns:
        Whether the shard was rewritten; False if it was in this form already.
    """
    with tarfile.open(path) as shard:
        members = [member for member in shard if member.isfile()]
        ordered = sorted(members, key=lambda member: key_and_suffix(member.name)[0] or member.name)
        if ordered == members and not any(member.mtime or member.uname for member in members):
            return False
        write_tar(path, ((m.name, m.size, cast(IO[bytes], shard.extractfile(m))) for m in ordered))
    return True
