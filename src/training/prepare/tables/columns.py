"""Finds the columns of a table: published names are known, other names are given by flags."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

URL, KEY, RAW = "url", "key", "raw_caption"
URL_NAMES = ("Image Path", "url", "URL", "image_url", "image_path", "Image_Path")
RAW_NAMES = ("raw_caption", "raw_captions", "org_caption", "caption", "TEXT", "text")
# Name in a table -> name in a training sample; the last two are of PixelProse and Recap-DataComp-1B.
LONG_NAMES = {name: name for name in ("longIB_captions", "longSV_captions", "longLLA_captions", "long_caption")}
LONG_NAMES |= {"vlm_caption": "long_caption", "re_caption": "long_caption"}
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
    long: Mapping[str, str]
    short: Mapping[str, str]

    @property
    def captions(self) -> dict[str, str]:
        """Name of each caption column -> name to write it under; the raw caption is first."""
        return ({self.raw: RAW} if self.raw else {}) | dict(self.long) | dict(self.short)

    @property
    def wanted(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(name for name in (self.url, self.key, *self.captions) if name))


def find_columns(where: str, header: Sequence[str], args: argparse.Namespace) -> Columns:
    """Finds the columns of one table.

    Args:
        where: the table's name, for messages.
        header: names of all its columns.
        args: the flags that name columns; None means the known names.

    Raises:
        ValueError: a column named by a flag, URL and key, or all captions are missing; or two would get the same name.
    """
    found = ", ".join(map(repr, header)) or "no columns"

    def checked(name: str, flag: str) -> str:
        if name not in header:
            raise ValueError(f"{where}: no column {name} ({flag}); it has {found}")
        return name

    def single(given: str | None, known: Sequence[str], flag: str) -> str | None:
        return checked(given, flag) if given else next((name for name in known if name in header), None)

    def several(given: Sequence[str] | None, known: Mapping[str, str], flag: str) -> dict[str, str]:
        if given is None:
            return {name: target for name, target in known.items() if name in header}
        pairs = (pair.partition("=") for pair in given)
        return {checked(name, flag): target or name for name, _, target in pairs}

    longs = several(args.long_caption_keys, LONG_NAMES, "--long-columns")
    shorts = several(args.short_caption_keys, SHORT_NAMES, "--short-columns")
    raw_names = [name for name in RAW_NAMES if name not in longs and name not in shorts]
    url, key = single(args.url_column, URL_NAMES, "--url-column"), single(args.key_column, (KEY,), "--key-column")
    columns = Columns(url, key, single(args.raw_caption_keys, raw_names, "--raw-column"), longs, shorts)
    if not url and not key:
        raise ValueError(f"{where}: no column of image URLs (--url-column) or keys (--key-column); it has {found}")
    if not columns.captions:
        flags = "--raw-column, --long-columns, --short-columns"
        raise ValueError(f"{where}: no captions; it has {found}. Name them: {flags}")
    targets = [URL, KEY, *columns.captions.values()]
    if twice := sorted({name for name in targets if targets.count(name) > 1}):
        raise ValueError(
            f"{where}: two columns would be written as {twice[0]}; give them names: --long-columns A=NAME,.."
        )
    return columns


def output_captions(tables: Sequence[Columns]) -> list[str]:
    """Returns the names of the caption columns of all tables to write, in the order raw, long, short."""
    raw = [RAW] if any(columns.raw for columns in tables) else []
    longs = [name for columns in tables for name in columns.long.values()]
    shorts = [name for columns in tables for name in columns.short.values()]
    return list(dict.fromkeys([*raw, *longs, *shorts]))
