"""Finds where the rows of a CSV end, a block at a time, up to the first row that needs the slow reader."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

_QUOTE, _LINE_END, _SEPARATOR, _ODD = 1, 2, 3, 4
# Zero bytes, and what Python also takes for line ends. A carriage return is odd if no newline follows it. The last
# three are odd as the ends of U+0085, U+2028 and U+2029 in UTF-8.
_ODD_BYTES = b"\0\x0b\x0c\r\x1c\x1d\x1e\x85\xa8\xa9"


def plain_row_ends(
    block: bytes, separator: str, quoted: bool, num_cells: int, max_bytes: int, is_row: Callable[[str], bool]
) -> tuple[np.ndarray, bool]:
    """Finds the plain rows at the start of a block. Every CSV parser reads a plain row the same way.

    A plain row is UTF-8, has the right number of cells, and has quotes only around whole cells or doubled within them.
    It contains no byte on which parsers differ, and no line that may be a row itself.

    Args:
        block: bytes of a CSV; the first byte begins a row.
        separator: one character.
        quoted: False if quotes are ordinary characters.
        num_cells: the number of cells of a good row.
        max_bytes: a row of this size or more is not plain.
        is_row: tells whether a line inside quotes may be a row itself, which means that a quote was never closed.

    Returns:
        The position at which each plain row ends, int64 [num_rows]; and whether these are all complete rows of the
        block.
    """
    if not separator.isascii():
        return np.zeros(0, dtype=np.int64), False
    codes, places = _marks(block, separator, quoted)
    is_quote, is_end, is_separator = codes == _QUOTE, codes == _LINE_END, codes == _SEPARATOR
    inside = np.cumsum(is_quote) % 2 == 1
    row_end = is_end & ~inside
    ends = places[row_end] + 1
    begins = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(ends)]
    cells = np.diff(np.cumsum(is_separator & ~inside)[row_end], prepend=0) + 1
    wrong = (cells != num_cells) | (ends - begins >= max_bytes) | (ends - begins <= 2)
    odd = [begins[wrong], _odd_places(block, codes, places), _misplaced_quotes(block, separator, places, codes, inside)]
    stop = min([int(found[0]) for found in odd if len(found)] + [int(ends[-1]) if len(ends) else 0])
    # Line breaks inside quotes after which a line follows that has enough separators for a row.
    lines, separators = places[is_end] + 1, np.cumsum(is_separator)[is_end]
    inner = ~row_end[is_end][:-1] & (lines[:-1] < stop) & (np.diff(separators) >= num_cells - 1)
    for line in np.flatnonzero(inner):
        if any(map(is_row, block[lines[line] : lines[line + 1]].decode("utf-8", "replace").splitlines())):
            stop = int(lines[line])
            break
    num_plain = int(np.searchsorted(ends, stop, side="right"))
    return ends[:num_plain], num_plain == len(ends)


def _marks(block: bytes, separator: str, quoted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes and positions of quotes, line ends, separators and odd bytes."""
    table = bytearray(256)
    for byte in _ODD_BYTES:
        table[byte] = _ODD
    table[ord("\n")], table[ord(separator)] = _LINE_END, _SEPARATOR
    if quoted:
        table[ord('"')] = _QUOTE
    marks = np.frombuffer(block.translate(bytes(table)), dtype=np.uint8)
    places = np.flatnonzero(marks != 0)
    return marks[places], places


def _odd_places(block: bytes, codes: np.ndarray, places: np.ndarray) -> list[int]:
    """Returns the positions of bytes that are not UTF-8 or that parsers read differently, sorted.

    Only the first position of each kind is included.
    """
    array = np.frombuffer(block, dtype=np.uint8)
    odd = places[codes == _ODD]
    byte, following = array[odd], array[np.minimum(odd + 1, len(array) - 1)]
    before, second_before = array[np.maximum(odd - 1, 0)], array[np.maximum(odd - 2, 0)]
    is_usual = (byte == ord("\r")) & (following == ord("\n"))
    is_usual |= (byte == 0x85) & (before != 0xC2)
    is_usual |= (byte >= 0xA8) & ((before != 0x80) | (second_before != 0xE2))
    found = odd[~is_usual][:1].tolist()
    if not block.isascii() and not _is_utf8(block):
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            found.append(error.start)
    return sorted(found)


def _is_utf8(block: bytes) -> bool:
    """Tells whether a block is UTF-8, 15 times faster than ``block.decode()``."""
    whole = pa.Array.from_buffers(
        pa.large_string(), 1, [None, pa.py_buffer(np.array([0, len(block)])), pa.py_buffer(block)]
    )
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _misplaced_quotes(
    block: bytes, separator: str, places: np.ndarray, codes: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Returns the positions of quotes that neither begin nor end a cell and are not doubled."""
    quotes, opening = places[codes == _QUOTE], inside[codes == _QUOTE]
    array = np.frombuffer(b"\n" + block + b" ", dtype=np.uint8)
    before, after = array[quotes], array[quotes + 2]
    free = np.zeros(256, dtype=bool)
    free[[ord(separator), ord("\n"), ord('"')]] = True
    return quotes[np.where(opening, ~free[before], ~free[after] & (after != ord("\r")))]
