"""The tar reader of training, evaluation and preparation.

It parses headers itself because Python's tarfile takes about three times as long and stops silently at a broken header.
Nothing is unpacked to disk, so a member's name can't lead outside a folder.
"""

import logging
from collections.abc import Iterator
from typing import IO, NamedTuple

from training.readers.faults import IS_POINTER, LFS_POINTER
from training.readers.files import is_leftover

BLOCK = 512
_CHUNK, _MAX_HEADER = 1 << 20, 1 << 20
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"S": "sparse", b"1": "link", b"2": "link"}
_EMPTY_KINDS = b"123456"  # links, devices, folders and pipes have no content, whatever their header says
_SPARSE_CONTINUES, _EXTENSION_CONTINUES = 482, 504  # bytes of a sparse file's headers that say another one follows


class BrokenTarError(ValueError):
    """A file that is not a tar file, is broken, or is truncated; the message says where.

    Attributes:
        sample_start: the byte where the sample begins within which the file breaks off; None if it does between two.
    """

    sample_start: int | None = None


class Member(NamedTuple):
    """An entry of a tar file.

    Attributes:
        name: its name in the tar file; bytes that are not UTF-8 are decoded as surrogates.
        kind: ``file``, ``sparse`` (a file stored without its holes), ``link`` or ``other``.
        start: byte where its headers begin.
        offset: byte where its content begins.
        size: size of the content in bytes.
    """

    name: str
    kind: str
    start: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The byte where the next member begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class TarReader:
    """Reads a tar file in one pass.

    Args:
        stream: the open file, positioned at the beginning of a member.
        name: name of the file, for messages.
        size: size of the file in bytes; None if the stream can't be positioned.
        position: position of the stream in the file, in bytes.
    """

    def __init__(self, stream: IO[bytes], name: str, size: int | None = None, position: int = 0):
        self.stream, self.name, self.size, self.position = stream, name, size, position
        self.at_end = False  # of an archive, after which another one may follow, or junk

    def members(self) -> Iterator[Member | None]:
        """Yields the members in order, and None where an archive ends.

        Raises:
            BrokenTarError: the file is not a tar file, is broken, or is truncated.
        """
        while header := self._block():
            if self.at_end:
                yield None
                continue
            start = self.position - BLOCK
            fields: dict[str, str] = {}
            while (kind := header[156:157]) in b"LKxg":
                if (size := self._size_of(header)) > _MAX_HEADER:
                    raise self._error(f"broken before byte {self.position:,}: a header of {size:,} bytes")
                fields |= _pax_fields(kind, self._take(size))
                header = self._block()
                if _is_empty(header):
                    raise self._error(f"broken before byte {self.position:,}: a long name without a member")
            size = int(fields["size"]) if fields.get("size", "").isdigit() else self._size_of(header)
            extended = kind == b"S" and header[_SPARSE_CONTINUES]
            while extended:
                extended = self._take(BLOCK)[_EXTENSION_CONTINUES]
            name = fields.get("GNU.sparse.name") or fields.get("path") or _name(header)
            kind_of = "other" if kind == b"\0" and name.endswith("/") else _KINDS.get(kind, "other")
            if any(key.startswith("GNU.sparse.") for key in fields):
                kind_of = "sparse"
            member = Member(name, kind_of, start, self.position, 0 if kind in _EMPTY_KINDS else size)
            yield member
            if self.size is not None and member.end > self.size:
                raise self._error(f"truncated, found {self.size:,} of at least {member.end:,} bytes")
            self._skip_to(member.end)

    def read(self, member: Member) -> bytes:
        """Returns the content of the member that `members` yielded last."""
        return self._take(member.size, padded=False)

    def _block(self) -> bytes:
        """Reads the next header; returns empty bytes at the end of the file, or of all archives in it."""
        start = self.position
        header = self.stream.read(BLOCK)
        self.position += len(header)
        if _is_empty(header):
            self.at_end = True
            return header
        if len(header) < BLOCK or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            if self.at_end:
                logging.warning(f"{self.name}: what follows byte {start:,}, after the end of the archive, is ignored")
                return b""
            if header.startswith(LFS_POINTER):
                raise BrokenTarError(f"{self.name}: {IS_POINTER}")
            if len(header) < BLOCK:
                raise self._error(f"truncated after {self.position:,} bytes")
            raise self._error(f"not a tar file, or broken at byte {start:,}")
        self.at_end = False
        return header

    def _size_of(self, header: bytes) -> int:
        size = _number(header[124:136])
        if size is None:
            raise self._error(f"broken before byte {self.position:,}: a member without a size")
        return size

    def _error(self, what: str) -> BrokenTarError:
        return BrokenTarError(f"{self.name}: {what}; fetch or pack it again")

    def _take(self, size: int, padded: bool = True) -> bytes:
        content = self.stream.read(size)
        self.position += len(content)
        if len(content) < size:
            raise self._error(f"truncated after {self.position:,} bytes")
        if padded:
            self._skip_to(self.position + -size % BLOCK)
        return content

    def _skip_to(self, position: int) -> None:
        if self.size is not None:
            self.stream.seek(position)
            self.position = position
        while self.position < position:
            passed = len(self.stream.read(min(position - self.position, _CHUNK)))
            self.position += passed
            if not passed:
                raise self._error(f"truncated after {self.position:,} bytes")


def _is_empty(header: bytes) -> bool:
    return not header or not header[0] and not header.strip(b"\0")


def key_and_suffix(name: str) -> tuple[str | None, str]:
    """Splits a member's name as webdataset does.

    Returns:
        ``a/0001.seg.PNG`` -> (``a/0001``, ``seg.png``); (None, "") for a leftover or a name without a suffix.
    """
    if is_leftover(name):
        return None, ""
    folder, slash, file = name.rpartition("/")
    stem, stop, suffix = file.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and stop else (None, "")


def _name(header: bytes) -> str:
    name, prefix = (
        header[part].split(b"\0", 1)[0].decode("utf-8", "surrogateescape") for part in (slice(100), slice(345, 500))
    )
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int | None:
    """Parses a number in a header: octal text, or base 256 for large files; None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _pax_fields(kind: bytes, content: bytes) -> dict[str, str]:
    """Parses an extra entry about the next member: a long name, or the records of a pax header."""
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields = {}
    while kind == b"x" and content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            break  # the zeros after the last record
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return fields
