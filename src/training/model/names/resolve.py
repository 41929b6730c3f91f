"""Finds a model's weights: they are checked, downloaded and hashed before the model is built."""

from pathlib import Path

import open_clip

from training.model.names.config import CONFIG_FILE, HF_HUB, LOCAL_DIR, resolve_model_config
from training.model.names.files import downloading, find_weights

_FOLDERS = {  # a file in a folder that was given in place of a weights file: what the folder is
    "*.distcp": "a PyTorch distributed checkpoint; convert it to one file: python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt",
    "zero*": "a DeepSpeed checkpoint; convert it to one file: cd {folder} && python zero_to_fp32.py . weights.pt",
    CONFIG_FILE: f"a folder with its own model config; give it as --model {LOCAL_DIR}{{folder}}",
    "": "a folder; give the weights file in it",
}


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
        with downloading(f"weights of --model {name}", cache_dir):
            repo = name.removeprefix(HF_HUB)
            return Path(open_clip.pretrained.download_pretrained_from_hf(repo, cache_dir=cache_dir))
    if folder and (file is None or (name.startswith(LOCAL_DIR) and not file.is_file())):
        return find_weights(folder)
    if file is None or file.is_file():
        return file
    if file.is_dir():
        about = next(about for pattern, about in _FOLDERS.items() if not pattern or any(file.glob(pattern)))
        raise ValueError(f"--pretrained {pretrained}: {about.format(folder=file)}")
    if ":" in name:
        raise ValueError(f"--pretrained {pretrained}: no such file, and --model {name} has no tags")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"--pretrained {pretrained}: no such file, and no tag of --model {name} (its tags: {known})")
    with downloading(f"--pretrained {pretrained} of --model {name}", cache_dir):
        return Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))
