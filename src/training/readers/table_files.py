"""Finds the files that a table flag names: one, several, a pattern, a folder, or a data set of the Hugging Face hub.

``hf:ORG/NAME[:CONFIG][:SPLIT]`` becomes the names of local files. The repository is downloaded once by
`huggingface_hub`, into its cache; without a connection, the cache is used. No code of a repository is executed.
"""

import fnmatch
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from training.readers.files import IMAGE_SUFFIXES, METADATA, TABLE_SUFFIXES, expand_name, matching_files
from training.runtime.messages import first_line

COLUMNAR = (".parquet", ".arrow")
FEATURES = "features.json"  # marks a folder of image features, whose files are Parquet as well
_SEPARATED = (".csv", ".tsv")
_OTHER_TABLES = (".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz", ".xlsx", ".feather")  # recognised, to refuse them
_NOT_ROWS = ("summary.json", "sizes.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_LONGEST_PATH = 4096  # PATH_MAX of Linux
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
_SPLIT_FILE = re.compile(r"(?P<split>[\w.]+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-\w+)?\.(parquet|arrow|jsonl|csv)")


def names_tables(spec: str | None) -> bool:
    """Returns whether a flag's value names tables or a folder of images, rather than tar shards or features."""
    if not spec:
        return False
    suffixes = (*TABLE_SUFFIXES, *_OTHER_TABLES)
    return any(name.endswith(suffixes) or is_data_set(name) or _is_source(Path(name)) for name in spec.split("::"))


def names_csv(spec: str | None) -> bool:
    """Returns whether a flag's value names CSV or TSV tables, which have a separator."""
    if not spec or not names_tables(spec):
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


def check_image_path(value: Any, where: str) -> None:
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
    return files


def local_spec(spec: str) -> str:
    """Replaces the data sets of the hub in the value of a flag by local files, which are downloaded if necessary.

    Args:
        spec: names separated by ``::``; those that don't begin with ``hf:`` are returned as they are. ``ORG/NAME`` may
            also be a local folder in the form of a repository.

    Raises:
        ValueError: a data set can't be fetched, has no such configuration or split, or has several and none is named.
    """
    return "::".join(_local(one) if is_data_set(one) else one for one in spec.split("::"))


def is_data_set(spec: str) -> bool:
    """Returns whether a name is a data set of the hub; ``hf://`` begins the URL of a file there."""
    return spec.startswith("hf:") and not spec.startswith("hf://")


def _local(spec: str) -> str:
    name, *words = spec.removeprefix("hf:").split(":")
    root = Path(name) if Path(name).is_dir() else _snapshot(name, spec)
    names = glob.glob("**", root_dir=root, recursive=True)  # without hidden files
    files = _data_files(root, sorted(name for name in names if (root / name).is_file()), words, spec)
    return "::".join(str(root / file) for file in files)


def _snapshot(name: str, spec: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (ValueError, OSError) as error:  # all errors of the hub are one of these
        raise ValueError(
            f"{spec}: no data set {name} on the hub or in its cache ({type(error).__name__}: {first_line(error)}); "
            "check the name, the connection and the login (hf auth login), or name a local folder"
        ) from error


def _data_files(root: Path, files: Sequence[str], words: Sequence[str], spec: str) -> list[str]:
    """Returns the files of a configuration and split, by the README's list or else by the names of files."""
    configs = _configs(root)
    if configs:
        config, words = _choose(configs, words, spec, "configurations")
        splits, words = _choose(configs[config], words, spec, "splits")
        patterns = configs[config][splits]
        files = [file for file in files if any(fnmatch.fnmatch(file, p.replace("**/", "*")) for p in patterns)]
        if not files:
            raise ValueError(f"{spec}: none of its files is called {' or '.join(patterns)}, as its README says")
    metadata = [file for file in files if os.path.basename(file) in METADATA]
    data = metadata or [file for file in files if file.endswith((*TABLE_SUFFIXES, ".tar"))]
    # Files of JSON describe the tables beside them.
    data = [file for file in data if not file.endswith(".json")] or data
    folder = "/".join(words)
    if not data and (root / folder).is_dir():
        return [folder]  # images alone, of a split or of the whole
    for word in words:
        named = [file for file in data if _is_of(file, word)]
        if not named:
            raise ValueError(f"{spec}: nothing called {word} among its files, such as {', '.join(data[:3]) or 'none'}")
        data = named
    parts = sorted({split for split in _SPLITS for file in data if _is_of(file, split)})
    if not parts and not words:
        parts = sorted({os.path.dirname(file) for file in data})
    if len(parts) > 1 and not configs:
        raise ValueError(f"{spec}: holds several splits or folders, {', '.join(parts)}; name one: {spec}:{parts[0]}")
    return data


def _is_of(file: str, word: str) -> bool:
    return re.search(rf"(?:^|[/_.-]){re.escape(word)}(?:[/_.-]|$)", file) is not None


def _choose(known: dict, words: Sequence[str], spec: str, kind: str) -> tuple[str, Sequence[str]]:
    """Returns (the key that the first word names, or the only one, or the one called default; the other words)."""
    first, *_ = known
    if words and words[0] in known:
        return words[0], words[1:]
    if len(known) == 1 or "default" in known:
        return first if len(known) == 1 else "default", words
    wrong = f"no {words[0]}; " if words else ""
    raise ValueError(f"{spec}: {wrong}it has the {kind} {', '.join(known)}; name one of them, such as :{first}")


def _configs(root: Path) -> dict[str, dict[str, list[str]]]:
    """Returns configuration -> split -> patterns of files, from the README's front matter; empty if it has none."""
    from huggingface_hub import metadata_load

    try:
        content = metadata_load(root / "README.md") if (root / "README.md").is_file() else None
    except (ValueError, yaml.YAMLError):
        return {}
    configs = {}
    try:
        for config in (content or {}).get("configs") or []:
            if files := config.get("data_files"):
                configs[str(config.get("config_name", "default"))] = _patterns(files)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{root / 'README.md'}: configs in another form than the hub's ({error!r})") from error
    return configs


def _patterns(files: str | list | dict) -> dict[str, list[str]]:
    """Returns split -> patterns of files, from any form of ``data_files``."""
    if isinstance(files, list) and isinstance(files[0], dict):
        files = {file.get("split", "train"): file["path"] for file in files}
    elif not isinstance(files, dict):
        files = {"train": files}
    return {str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in files.items()}
