"""Finds the files that a table flag names: one, several, a pattern, a folder, or a data set of the Hugging Face hub."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from training.readers.files import IMAGE_SUFFIXES, METADATA, TABLE_SUFFIXES, expand_name, matching_files
from training.readers.hub import is_data_set

COLUMNAR = (".parquet", ".arrow")
FEATURES = "features.json"  # marks a folder of image features, whose files are Parquet as well
_SEPARATED = (".csv", ".tsv")
_OTHER_TABLES = (".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz", ".xlsx", ".feather")  # recognised, to refuse them
_NOT_ROWS = ("summary.json", "sizes.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_LONGEST_PATH = 4096  # PATH_MAX of Linux
_SPLIT_FILE = re.compile(r"(?P<split>[\w.]+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?\.(parquet|arrow|jsonl|csv)")


def names_tables(spec: str | None) -> bool:
    """Returns whether a flag's value names tables or a folder of images, rather than tar shards or features."""
    if not spec:
        return False
    suffixes = (*TABLE_SUFFIXES, *_OTHER_TABLES)
    return any(name.endswith(suffixes) or is_data_set(name) or _is_source(Path(name)) for name in spec.split("::"))


def names_csv(spec: str | None) -> bool:
    """Returns whether a flag's value names CSV or TSV tables, which have a separator."""
    if not names_tables(spec):
        return False
    try:
        return any(path.suffix in _SEPARATED for path in table_files(spec))
    except (ValueError, OSError):
        return True  # reported when the table is read


def _is_source(folder: Path) -> bool:
    if not folder.is_dir() or any(name.endswith(".tar") or name == FEATURES for name in os.listdir(folder)):
        return False
    return bool(_candidates(folder) or _splits(folder) or next(image_files(folder), None))


def table_files(spec: str) -> list[Path]:
    """Returns the files that a flag's value names.

    Args:
        spec: names separated by ``::``. Each is a file, a pattern (``part-*.parquet``, ``{000..012}.csv``) or a folder
            of tables, also one that `datasets.save_to_disk` wrote, that was cloned from the Hugging Face hub, or that
            has ``metadata.csv`` beside images. A folder of images without tables is returned as it is.

    Raises:
        FileNotFoundError, ValueError: no file was found, a folder is ambiguous, or a folder lacks some of its files.
    """
    files = [path for source in spec.split("::") for path in _expand(source)]
    (path, number) = Counter(files).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{path}: named twice")
    return files


def _expand(source: str) -> list[Path]:
    if "://" in source and not source.startswith("file:"):
        raise ValueError(f"{source}: tables are read from local files; download it first")
    found: list[Path] = []
    for name in expand_name(source):
        if os.path.isdir(name):
            return _files_of_folder(Path(name))
        matches = matching_files(name)
        if not matches:
            raise FileNotFoundError(f"{name}: no such file")
        found += map(Path, matches)
    for path in found:
        if path.suffix not in TABLE_SUFFIXES:
            raise ValueError(f"{path}: expected {', '.join(TABLE_SUFFIXES)}; unpack or convert it")
    return found


def check_image_path(value: object, where: str) -> None:
    """Raises ValueError, whose message begins with `where`, if a cell that is not empty doesn't hold an image path."""
    value = value.get("path") if isinstance(value, dict) else value
    if value and not isinstance(value, str):
        found = f"a {type(value).__name__}"
    elif value and "://" in value[:10]:
        found = f"a URL ({value[:80]}); download it first, as python -m training.prepare does"
    elif value and (len(value) >= _LONGEST_PATH or value.startswith(("/9j/", "iVBORw0KGgo", "data:image/"))):
        found = f"a text of {len(value):,} characters that begins with {value[:12]!r}; decode base64 to bytes"
    else:
        return
    raise ValueError(f"{where}: the image is {found}. Expected a path, or bytes and path as on the hub")


def beside(table: Path, name: str) -> str:
    r"""Returns the path of an image that a table names, relative to its folder; also if it was written with ``\``."""
    path = os.path.join(table if table.is_dir() else table.parent, name)
    return path if "\\" not in name or os.path.exists(path) else beside(table, name.replace("\\", "/"))


def image_files(folder: Path) -> Iterator[Path]:
    """Yields the images in a folder and its subfolders, sorted by name; hidden files and folders are skipped."""
    suffixes = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in names if not name.startswith(".") and name.lower().endswith(suffixes))
        yield from (Path(where, name) for name in sorted(images))


def _candidates(folder: Path) -> list[Path]:
    """Returns the tables directly in a folder; if there are none, those in its ``data`` folder."""
    state = folder / "state.json"
    if state.is_file():  # written by `save_to_disk`, which leaves cached results beside the data
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            pass
    names = set(os.listdir(folder))
    if metadata := next((name for name in METADATA if name in names), None):
        return [folder / metadata]
    tables = sorted(n for n in names if n.endswith(TABLE_SUFFIXES) and not n.startswith((".", "_", "cache-")))
    tables = [name for name in tables if name not in _NOT_ROWS and not name.endswith("_stats.json")]
    rows = [name for name in tables if not name.endswith(".json")] or tables  # .json files describe tables beside them
    if any(os.path.splitext(name)[0] in names for name in rows):
        return []  # img2dataset's loose files: a folder of images beside each table of URLs
    if any(f"{os.path.splitext(name)[0]}.{suffix}" in names for name in tables[:1] for suffix in IMAGE_SUFFIXES):
        return []  # NAME.json beside NAME.jpg
    if not rows and "data" in names and (folder / "data").is_dir():
        return _candidates(folder / "data")
    return [folder / name for name in rows]


def _splits(folder: Path) -> list[str]:
    """Returns the folders of splits that a folder holds."""
    marks = ("state.json", *METADATA)
    return [str(path) for path in sorted(folder.iterdir()) if any((path / mark).is_file() for mark in marks)]


def _files_of_folder(folder: Path) -> list[Path]:
    files = _candidates(folder)
    if not files and (splits := _splits(folder)):
        if len(splits) == 1:
            return _files_of_folder(Path(splits[0]))
        raise ValueError(f"{folder}: holds several splits; name one of them: {', '.join(splits)}")
    if not files and next(image_files(folder), None):
        return [folder]
    if not files:
        raise ValueError(f"{folder}: no {', '.join(TABLE_SUFFIXES)} and no images in this folder or in its data folder")
    kinds = sorted({path.suffix for path in files})
    if len(kinds) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(kinds)} files; name the files that are meant")
    matches = [match for match in (_SPLIT_FILE.fullmatch(path.name) for path in files) if match]
    splits = sorted({match["split"] for match in matches})
    if len(splits) > 1:
        where = files[0].parent
        raise ValueError(
            f"{folder}: holds the splits {', '.join(splits)}; name one of them, such as "
            f"'{where / splits[0]}-*{files[0].suffix}'"
        )
    if matches and len(matches) < int(matches[0]["total"]):
        raise ValueError(f"{folder}: found {len(matches)} of {int(matches[0]['total'])} files; fetch the others")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such file, but {folder / 'state.json'} names it")
    return files
