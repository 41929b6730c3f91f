"""Finds a model's config and weights: they are checked, downloaded and hashed before the model is built."""

import hashlib
from pathlib import Path

import open_clip

from training.model.names import transformers_clip
from training.model.names.config import CONFIG_FILE, HF_HUB, LOCAL_DIR, resolve_model_config
from training.model.names.transformers_clip import HF
from training.runtime.messages import first_line

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def resolve_weights(name: str, pretrained: str | None, cache_dir: str | None = None) -> Path | None:
    """Finds a model's weights file, and downloads it if necessary.

    Args:
        name: see `config.resolve_model_config`.
        pretrained: open_clip's tag or a weights file; None for an untrained model.
        cache_dir: folder for downloads, searched first.

    Returns:
        The file, or None for an untrained model.

    Raises:
        ValueError: unknown model, or `pretrained` is neither one of its tags nor a file.
        FileNotFoundError: a folder, config or file does not exist, or the download failed.
    """
    folder = resolve_model_config(name, cache_dir=cache_dir).folder
    file = Path(pretrained) if pretrained else None
    if name.startswith(HF_HUB):
        return Path(open_clip.pretrained.download_pretrained_from_hf(name.removeprefix(HF_HUB), cache_dir=cache_dir))
    if name.startswith(LOCAL_DIR) and not (file and file.is_file()):
        return find_weights(folder)
    if file is None:
        return transformers_clip.find_weights(folder) if name.startswith(HF) else None
    if file.is_file():
        return file
    if file.is_dir():
        raise ValueError(f"--pretrained {pretrained}: {_about_folder(file)}")
    if ":" in name:
        raise ValueError(f"--pretrained {pretrained}: no such file, and --model {name} has no tags")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"--pretrained {pretrained}: no such file, and no tag of --model {name} (its tags: {known})")
    try:
        return Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))
    except Exception as error:  # urllib's, huggingface_hub's and open_clip's own errors have no common base
        raise FileNotFoundError(
            f"--pretrained {pretrained} of --model {name}: download failed ({first_line(error)}); check the network, "
            f"or download the file on another machine and give its path"
        ) from error


def find_weights(folder: Path) -> Path | None:
    """Returns a folder's weights file by open_clip's order of preference; None if there is none."""
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    # Safetensors first, open_clip's own file names first.
    files.sort(key=lambda p: (WEIGHT_SUFFIXES.index(p.suffix), not p.name.startswith("open_clip")))
    return files[0] if files else None


def _about_folder(folder: Path) -> str:
    """Returns what kind of folder was given in place of a weights file, and what to do about it."""
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith(".distcp") for name in names):
        return (
            "a PyTorch distributed checkpoint; convert it to one file: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    if "zero_to_fp32.py" in names or any(name.startswith("zero_pp_rank") for name in names):
        return f"a DeepSpeed checkpoint; convert it to one file: cd {folder} && python zero_to_fp32.py . weights.pt"
    if CONFIG_FILE in names:
        return f"a folder with its own model config; give it as --model {LOCAL_DIR}{folder}"
    return "a folder; give the weights file in it"


def file_sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
