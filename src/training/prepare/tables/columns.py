"""Finds the columns of a table: published names are known, other names are given by flags."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

URL, KEY, RAW = "url", "key", "raw_caption"
URL_NAMES = ("Image Path", "url", "URL", "image_url", "image_path", "Image_Path")
KEY_NAMES = ("key",)
RAW_NAMES = ("raw_caption", "raw_captions", "org_caption", "caption", "TEXT", "text")
# Name in a table -> name in a training sample.
LONG_NAMES = {
    "longIB_captions": "longIB_captions",
    "longSV_captions": "longSV_captions",
    "longLLA_captions": "longLLA_captions",
    "long_caption": "long_caption",
    "vlm_caption": "long_caption",  # PixelProse
    "re_caption": "long_caption",  # Recap-DataComp-1B
}
SHORT_NAMES = {name: name for name in ("shortIB_captions", "shortSV_captions", "shortLLA_captions")}


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    Attributes:
        url, key, raw: names of the columns of image URLs, keys and raw captions; None if the table has no such column.
        long, short: name of a caption column -> name to write it under.
    """

    url: str | None
    key: str | None
    raw: str | None
    long: Mapping[str, str] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)

    @property
    def captions(self) -> dict[str, str]:
        """Name of each caption column -> name to write it under; the raw caption is first."""
        return ({self.raw: RAW} if self.raw else {}) | dict(self.long) | dict(self.short)


def find_columns(
    where: str,
    header: Sequence[str],
    url: str | None = None,
    key: str | None = None,
    raw: str | None = None,
    long: Sequence[str] | None = None,
    short: Sequence[str] | None = None,
) -> Columns:
    """Finds the columns of one table.

    Args:
        where: the table's name, for messages.
        header: names of all its columns.
        url, key, raw: names given by flags; None means the known names.
        long, short: ``NAME`` or ``NAME=NAME_TO_WRITE`` given by flags; None means the known names. May be empty.

    Raises:
        ValueError: a column named by a flag, URL and key, or all captions are missing; or two would get the same name.
    """

    def single(given: str | None, known: Sequence[str], flag: str) -> str | None:
        if given and given not in header:
            raise ValueError(f"{where}: no column {given} ({flag}); it has {_listed(header)}")
        return given or next((name for name in known if name in header), None)

    def several(given: Sequence[str] | None, known: Mapping[str, str], flag: str) -> dict[str, str]:
        if given is None:
            return {name: target for name, target in known.items() if name in header}
        pairs = dict((name.partition("=")[0], name.partition("=")[2] or name) for name in given)
        for name in pairs:
            if name not in header:
                raise ValueError(f"{where}: no column {name} ({flag}); it has {_listed(header)}")
        return pairs

    longs = several(long, LONG_NAMES, "--long-columns")
    shorts = several(short, SHORT_NAMES, "--short-columns")
    known_raw = [name for name in RAW_NAMES if name not in longs and name not in shorts]
    columns = Columns(
        single(url, URL_NAMES, "--url-column"),
        single(key, KEY_NAMES, "--key-column"),
        single(raw, known_raw, "--raw-column"),
        longs,
        shorts,
    )
    if not columns.url and not columns.key:
        raise ValueError(
            f"{where}: no column of image URLs (--url-column) or keys (--key-column); it has {_listed(header)}"
        )
    if not columns.captions:
        raise ValueError(
            f"{where}: no captions; it has {_listed(header)}. Name them: --raw-column, --long-columns, --short-columns"
        )
    targets = [URL, KEY, *columns.captions.values()]
    twice = sorted({name for name in targets if targets.count(name) > 1})
    if twice:
        raise ValueError(
            f"{where}: two columns would be written as {twice[0]}; give them names: --long-columns A=NAME,.."
        )
    return columns


def _listed(header: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in header) or "no columns"


def output_captions(tables: Sequence[Columns]) -> list[str]:
    """Returns the names of the caption columns of all tables to write, in the order raw, long, short."""
    raw = [RAW] if any(columns.raw for columns in tables) else []
    longs = [name for columns in tables for name in columns.long.values()]
    shorts = [name for columns in tables for name in columns.short.values()]
    return list(dict.fromkeys([*raw, *longs, *shorts]))
