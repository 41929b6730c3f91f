"""Makes shards reproducible: samples are sorted by key, and headers have no times and owners."""

import tarfile
from pathlib import Path
from typing import IO

from training.readers.tar import BLOCK, Member, TarReader, key_and_suffix
from training.runtime.files import atomic_write


def order_shard(path: Path) -> bool:
    """Sorts the samples of a complete shard by key, and removes times and owners; contents are unchanged.

    Returns:
        Whether the shard was rewritten; False if it was in this form already.
    """
    with open(path, "rb") as source:
        members = [m for m in TarReader(source, str(path), path.stat().st_size).members() if m and m.kind == "file"]
        ordered = sorted(members, key=lambda member: key_and_suffix(member.name)[0] or member.name)
        if ordered == members and not any(_has_traces(source, member) for member in members):
            return False
        with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as target:
            for member in ordered:
                plain = tarfile.TarInfo(member.name)
                plain.size = member.size
                source.seek(member.offset)
                target.addfile(plain, source)
    return True


def _has_traces(source: IO[bytes], member: Member) -> bool:
    source.seek(member.offset - BLOCK)
    header = tarfile.TarInfo.frombuf(source.read(BLOCK), "utf-8", "surrogateescape")
    return bool(header.mtime or header.uname)
