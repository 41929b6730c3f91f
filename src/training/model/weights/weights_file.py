"""Reads weights files of many formats as plain tensors, without running code from them.

The format is detected from the content. A file that can't be read is refused with a message that names the format found
and how to convert it.
"""

import argparse
import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from training.model.weights.adapters import merge_adapters
from training.runtime.messages import first_line

# Index files of weights that transformers has split into several files.
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_TRIED = "safetensors, PyTorch (zip and legacy), TorchScript"
_AGAIN, _UNPACK = "fetch it again", "unpack it and give the weights file inside"
_SAVE = "save its tensors as safetensors under the names of a state dict"
_OTHERS = yaml.safe_load(Path(__file__).with_name("other_formats.yaml").read_text(encoding="utf-8"))
INDEX, PYTORCH, SAFETENSORS, TORCHSCRIPT = "index of several files", "PyTorch", "safetensors", "TorchScript"
# Keys under which checkpoints store the weights. Averaged weights (EMA) come first, as in timm: results are usually
# reported for them.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module")
_BROKEN = (RuntimeError, SafetensorError, EOFError, LookupError, AttributeError, TypeError, zipfile.BadZipFile)
_WRAPPING_MODULES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch.compile, FSDP


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a weights file without running code from it.

    Args:
        path: a safetensors file (or the ``.index.json`` of several); a PyTorch file of plain tensors, either a state
            dict or a checkpoint that contains one; or a TorchScript archive (OpenAI's), whose tensors are read as data.

    Returns:
        Name -> tensor on the CPU, without the prefixes of DDP, FSDP, torch.compile and Lightning; adapters merged.

    Raises:
        ValueError: the file is broken, contains more than plain tensors, or contains no weights.
    """
    path = Path(path)
    content = _read(path)
    while isinstance(content, dict):
        found = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if not found:
            break
        if found[0] in _AVERAGED and len(found) > 1:
            logging.warning(f"{path}: reading the averaged weights ({found[0]}), not {found[1]}")
        content = content[found[0]]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(
            f"{path}: no weights in it, but {_describe(content)}; expected a state dict (name -> tensor), or a "
            f"checkpoint with one under {', '.join(_WRAPPERS[-4:])}"
        )
    return merge_adapters(_without_prefixes(tensors))


def _describe(content: object) -> str:
    if isinstance(content, dict) and content:
        return f"a dict with {', '.join(str(key)[:40] for key in list(content)[:5])}"
    return f"a {type(content).__name__} of {len(content):,}" if hasattr(content, "__len__") else repr(content)[:40]


def _without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the parts that wrappers add before and within the names."""
    if any(key.startswith("module.") for key in state):
        state.pop("n_averaged", None)  # torch's AveragedModel
    state = {".".join(word for word in key.split(".") if word not in _WRAPPING_MODULES): v for key, v in state.items()}
    state = {key.removeprefix("module."): v for key, v in state.items()}
    prefix = next((p for p in ("model.", "clip.") if all(key.startswith(p) for key in state)), "")
    return {key.removeprefix(prefix): v for key, v in state.items()}


def _read(path: Path) -> Any:
    kind = format_of(path)
    try:
        if kind in _READERS:
            return _READERS[kind](path)
        if kind != PYTORCH:
            raise ValueError(f"{path}: {kind}")
        # Many trainers store their flags, a Namespace, with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, where the format allows it, tensors are copied only once: into the model.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) `?([a-z_]\w*\.[\w.]+)", str(error))
        raise ValueError(
            f"{path}: not a file of plain tensors: it contains {found[1] if found else 'a pickle'}, which could run "
            "code and is not loaded; if you trust the file, convert it: safetensors.torch.save_file("
            "model.state_dict(), 'model.safetensors')"
        ) from error
    except _BROKEN as error:
        raise ValueError(f"{path}: broken weights file ({first_line(error)}); {_AGAIN}") from error


def format_of(path: Path) -> str:
    """Returns the format of a file by its content: one of the constants above, or a message about another one."""
    with open(path, "rb") as file:
        head = file.read(512)
    if path.name.endswith(INDEX_SUFFIXES):
        return INDEX
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:  # these 8 bytes may be those of any format
        return SAFETENSORS
    known = _OTHERS["beginnings"].items()
    found = [about for start, about in known if re.match(start.encode("latin-1"), head, re.IGNORECASE | re.DOTALL)]
    if path.suffix in _OTHERS["suffixes"] or found:
        return "; ".join(_OTHERS["suffixes"].get(path.suffix) or found[0])
    if path.suffix == ".safetensors":
        return SAFETENSORS
    if head[:4] == b"PK\x03\x04":
        return _format_of_zip(path)
    if head[:1] == b"\x80":
        return PYTORCH
    return f"unknown format, begins with {head[:8]!r}; tried as {_TRIED}; convert it to safetensors"


def _format_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return PYTORCH  # broken; torch says how
    ends = {name.partition("/")[2] for name in names}
    if "data.pkl" in ends:
        return TORCHSCRIPT if "constants.pkl" in ends else PYTORCH
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz); {_SAVE}"
    return f"a zip archive of {len(names)} files ({', '.join(names[:3])}); {_UNPACK}"


def _read_index(path: Path) -> dict[str, torch.Tensor]:
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not an index of weights files ('weight_map' is missing or invalid)") from error
    state: dict[str, torch.Tensor] = {}
    for file in (path.parent / Path(name).name for name in files):
        if not file.is_file():
            raise ValueError(f"{path}: {file.name}, one of its {len(files)} files, is missing; download it")
        state |= _read(file)
    return state


class _Module(nn.Module):
    """Stands in for the modules of a TorchScript archive: it holds their tensors and has no code of theirs."""

    def __setstate__(self, state: dict[str, object]) -> None:
        nn.Module.__init__(self)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            elif isinstance(value, _Module):
                self.add_module(name, value)


class _TensorUnpickler(pickle.Unpickler):
    """Reads the modules of a TorchScript archive as `_Module`; refuses every global that is not listed here."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> type | Callable:
        if module.startswith("__torch__"):
            return _Module
        dtype = getattr(torch, name.removesuffix("Storage").lower(), None)
        if module == "torch" and isinstance(dtype, torch.dtype):
            return type(name, (), {"dtype": dtype})  # FloatStorage: torch.float
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists of plain values, and tags of types
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"global {module}.{name}")

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        _, kind, key, _, size = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=kind.dtype) if data else torch.empty(0, dtype=kind.dtype)
        return self.storages[key]


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Returns the parameters and buffers of a TorchScript archive; its code is never read."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        return _TensorUnpickler(archive, root).load().state_dict()


_READERS: dict[str, Callable] = {INDEX: _read_index, TORCHSCRIPT: _read_torchscript, SAFETENSORS: load_file}
