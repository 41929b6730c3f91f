"""Shards without traces of who came first: samples by their keys, no times in the headers."""

import tarfile
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from training.runtime.files import whole_file


def order_shard(path: Path) -> bool:
    """Sorts a whole shard's samples by key and drops the members' times and owners; what is in them stays.

    Returns:
        Whether anything had to be done.
    """
    with tarfile.open(path, "r:") as source:
        members = [member for member in source if member.isreg()]
        ordered = sorted(members, key=lambda member: base_plus_ext(member.name)[0] or member.name)
        if ordered == members and not any(member.mtime or member.uname for member in members):
            return False
        with whole_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as target:
            for member in ordered:
                plain = tarfile.TarInfo(member.name)
                plain.size = member.size
                target.addfile(plain, source.extractfile(member))
    return True
