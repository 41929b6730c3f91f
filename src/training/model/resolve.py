"""Where a model's config and weights come from: checked, downloaded and fingerprinted before a model is built."""

import difflib
import hashlib
from pathlib import Path

import open_clip

from training.model.config import HF_HUB, LOCAL_DIR, read_config_file, register_model_configs
from training.runtime.messages import first_line

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def resolve_weights(name: str, pretrained: str | None, cache_dir: str | None = None) -> Path | None:
    """Finds the weights file that open_clip will load, downloading it if need be.

    Args:
        name: open_clip's model name, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``.
        pretrained: open_clip's tag or a weights file; None for an untrained model.
        cache_dir: where downloads are kept and looked up first.

    Returns:
        The file, or None for an untrained model.

    Raises:
        ValueError: unknown model, or neither a tag of it nor a file.
        FileNotFoundError: folder, config or file not there, or the download failed.
    """
    if name.startswith(LOCAL_DIR):
        return _weights_in_folder(Path(name.removeprefix(LOCAL_DIR)))
    if name.startswith(HF_HUB):
        return Path(open_clip.pretrained.download_pretrained_from_hf(name.removeprefix(HF_HUB), cache_dir=cache_dir))
    check_model_name(name)
    if pretrained is None:
        return None
    if Path(pretrained).is_file():
        return Path(pretrained)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"--pretrained {pretrained}: no such file, and no tag of --model {name} (its tags: {known})")
    try:
        return Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))
    except Exception as error:  # urllib's, huggingface_hub's and open_clip's own errors have no common base
        raise FileNotFoundError(
            f"--pretrained {pretrained} of --model {name}: download failed ({first_line(error)}); check the network, "
            f"or download it elsewhere and give the file"
        ) from error


def check_model_name(name: str) -> None:
    """Raises ValueError with the nearest names if open_clip knows no such model."""
    register_model_configs()
    known = open_clip.list_models()
    if name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
        raise ValueError(
            f"--model {name}: no such model; the nearest of {len(known)} names: {', '.join(near)} "
            f"(all: python -c 'import open_clip; print(open_clip.list_models())'), or local-dir:FOLDER, hf-hub:ORG/REPO"
        )


def _weights_in_folder(folder: Path) -> Path:
    read_config_file(folder)
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    # open_clip's own preference: safetensors first, its own file names first.
    files.sort(key=lambda p: (WEIGHT_SUFFIXES.index(p.suffix), not p.name.startswith("open_clip")))
    if not files:
        raise FileNotFoundError(f"--model {LOCAL_DIR}{folder}: no weights there ({', '.join(WEIGHT_SUFFIXES)})")
    return files[0]


def file_sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
