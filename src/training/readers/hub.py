"""Data sets of the Hugging Face hub: ``hf:ORG/NAME[:CONFIG][:SPLIT]`` becomes the names of local files.

The repository is downloaded once by `huggingface_hub`, into its cache; without a connection, the cache is used. No code
of a repository is executed.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from training.readers.files import METADATA, TABLE_SUFFIXES
from training.runtime.messages import first_line

_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


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
    return "::".join(str(root / file) for file in files) or str(root)  # images alone


def _snapshot(name: str, spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
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
    for word in words:
        named = [file for file in data if _is_of(file, word)]
        if not named:
            raise ValueError(f"{spec}: nothing called {word} among its files, such as {', '.join(data[:3]) or 'none'}")
        data = named
    found = sorted({split for split in _SPLITS for file in data if _is_of(file, split)})
    if len(found) > 1 and not configs:
        raise ValueError(f"{spec}: holds the splits {', '.join(found)}; name one: {spec}:{found[0]}")
    folders = sorted({os.path.dirname(file) for file in data})
    if len(folders) > 1 and not configs and not found and not words:
        raise ValueError(f"{spec}: holds data in several folders ({', '.join(folders)}); name one: {spec}:{folders[0]}")
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
                configs[str(config.get("config_name", "default"))] = _splits(files)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{root / 'README.md'}: configs in another form than the hub's ({error!r})") from error
    return configs


def _splits(files: str | list | dict) -> dict[str, list[str]]:
    """Returns split -> patterns of files, from any form of ``data_files``."""
    if isinstance(files, list) and isinstance(files[0], dict):
        files = {file.get("split", "train"): file["path"] for file in files}
    elif not isinstance(files, dict):
        files = {"train": files}
    return {str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in files.items()}
