"""Columns and rows of tables of any kind and size, as all commands read them.

Published names of columns are known, other names are given by flags.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from training.readers.captions import caption_texts
from training.readers.tables import open_table

URL, KEY, RAW = "url", "key", "raw_caption"
URL_NAMES = ("Image Path", "url", "URL", "image_url", "image_path", "Image_Path")
RAW_NAMES = ("raw_caption", "raw_captions", "org_caption", "caption", "TEXT", "text")
# Name in a table -> name in a training sample; the last two are of PixelProse and Recap-DataComp-1B.
LONG_NAMES = {name: name for name in ("longIB_captions", "longSV_captions", "longLLA_captions", "long_caption")}
LONG_NAMES |= {"vlm_caption": "long_caption", "re_caption": "long_caption"}
SHORT_NAMES = {name: name for name in ("shortIB_captions", "shortSV_captions", "shortLLA_captions")}

open_large = partial(open_table, limit=1 << 24)  # the form of a CSV is chosen by its first 16 MB


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

    def several(given: Sequence[str] | None, known: Mapping[str, str], flag: str) -> dict[str, str]:
        pairs = [(name, target) for name, _, target in (pair.partition("=") for pair in given or ())]
        if missing := [name for name, _ in pairs if name not in header]:
            raise ValueError(f"{where}: no column {missing[0]} ({flag}); it has {found}")
        if given is not None:
            return {name: target or name for name, target in pairs}
        return {name: target for name, target in known.items() if name in header}

    def single(given: str | None, known: Sequence[str], flag: str) -> str | None:
        names = several([f"{given}="] if given else None, dict.fromkeys(known, ""), flag)
        return next(iter(names), None)

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
        hint = "give them names: --long-columns A=NAME,.."
        raise ValueError(f"{where}: two columns would be written as {twice[0]}; {hint}")
    return columns


def cell_name(value: object) -> str:
    """Returns the URL or key in a cell; an empty text if it holds none."""
    return "" if value is None or isinstance(value, float) else as_utf8(str(value).strip())


def as_utf8(text: str) -> str:
    """Returns a text that can be written: JSON may contain half a surrogate pair, which becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def cell_texts(value: object, lists: str) -> list[str]:
    """Returns the captions in a cell, which can be written as UTF-8; none if it holds something else than captions."""
    try:
        return [as_utf8(text) for text in caption_texts(value, lists=lists)]
    except ValueError:
        return []
