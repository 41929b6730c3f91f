"""Finds the files that a table flag names: one, several, a pattern, or a folder of a Hugging Face data set."""

import json
import re
from pathlib import Path

from training.readers.files import TABLE_SUFFIXES, matching_files

COLUMNAR = (".parquet", ".arrow")
FEATURES = "features.json"  # marks a folder of image features, whose files are Parquet as well
_OTHER_TABLES = (".csv.gz", ".tsv.gz", ".json", ".jsonl", ".xlsx", ".feather")  # recognised, to refuse them clearly
_LONGEST_PATH = 4096  # PATH_MAX of Linux
_SPLIT_FILE = re.compile(r"(?P<split>[\w.]+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?\.(parquet|arrow)")


def names_tables(spec: str | None) -> bool:
    """Tells whether a flag's value names tables rather than tar shards or features."""
    if not spec:
        return False
    suffixes = (*TABLE_SUFFIXES, *_OTHER_TABLES)
    return any(part.endswith(suffixes) or _is_folder_of_tables(Path(part)) for part in spec.split("::"))


def names_csv(spec: str | None) -> bool:
    """Tells whether a flag's value names CSV or TSV tables, which have a separator."""
    if not names_tables(spec):
        return False
    try:
        return any(path.suffix not in COLUMNAR for path in table_files(spec))
    except (ValueError, OSError):
        return True  # reported when the table is read


def _is_folder_of_tables(folder: Path) -> bool:
    if not folder.is_dir() or any(path.suffix == ".tar" or path.name == FEATURES for path in folder.iterdir()):
        return False
    return bool(_candidates(folder)) or (folder / "dataset_dict.json").is_file()


def table_files(spec: str) -> list[Path]:
    """Returns the files that a flag's value names.

    Args:
        spec: names separated by ``::``. Each is a file, a pattern (``part-*.parquet``, ``{000..012}.csv``) or a folder
            of tables, also one that `datasets.save_to_disk` wrote or that was cloned from the Hugging Face hub.

    Raises:
        FileNotFoundError, ValueError: no file was found, a folder is ambiguous, or a folder lacks some of its files.
    """
    files = [path for part in spec.split("::") for path in _expand(part)]
    twice = sorted({str(path) for path in files if files.count(path) > 1})
    if twice:
        raise ValueError(f"{twice[0]}: named twice")
    return files


def _expand(part: str) -> list[Path]:
    from braceexpand import braceexpand

    path = Path(part)
    if path.is_dir():
        return _files_of_folder(path)
    if "://" in part:
        raise ValueError(f"{part}: tables are read from local files; download it first")
    if path.is_file():
        return [_checked(path)]
    found = []
    for name in braceexpand(part):
        matches = matching_files(name)
        if not matches:
            raise FileNotFoundError(f"{name}: no such file")
        found += [_checked(Path(match)) for match in matches]
    return found


def _checked(path: Path) -> Path:
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: expected {', '.join(TABLE_SUFFIXES)}; unpack or convert it")
    return path


def check_image_path(value: object, where: str) -> str | None:
    """Returns the image path in a cell; None for an empty cell.

    Raises:
        ValueError: the cell doesn't hold a path; the message begins with `where`.
    """
    if not value:
        return None
    if not isinstance(value, str):
        found = f"a {type(value).__name__}"
    elif "://" in value[:10]:
        found = f"a URL ({value[:80]}); download it first, as python -m training.prepare does"
    elif len(value) >= _LONGEST_PATH or value.startswith(("/9j/", "iVBORw0KGgo", "data:image/")):
        found = f"a text of {len(value):,} characters that begins with {value[:12]!r}; decode base64 to bytes"
    else:
        return value
    raise ValueError(f"{where}: the image is {found}. Expected a path, or bytes and path as on the hub")


def _candidates(folder: Path) -> list[Path]:
    """Returns the tables directly in a folder; if there are none, those in its ``data`` folder."""
    state = folder / "state.json"
    if state.is_file():  # written by `save_to_disk`, which leaves cached results beside the data
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            pass
    own = sorted(p for p in folder.iterdir() if p.suffix in TABLE_SUFFIXES and not p.name.startswith((".", "cache-")))
    return own or (_candidates(folder / "data") if (folder / "data").is_dir() else [])


def _files_of_folder(folder: Path) -> list[Path]:
    files = _candidates(folder)
    if not files and (folder / "dataset_dict.json").is_file():
        splits = sorted(str(path.parent) for path in folder.glob("*/state.json"))
        raise ValueError(f"{folder}: holds several splits; name one of them: {', '.join(splits)}")
    if not files:
        raise ValueError(f"{folder}: no {', '.join(TABLE_SUFFIXES)} in this folder or in its data folder")
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
