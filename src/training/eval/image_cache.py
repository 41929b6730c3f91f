"""Cache of decoded and resized images on disk, for evaluating several models with the same image size.

    DIR/READING/KE/KEY.npz    pixels [H, W, 3] uint8; KEY is the SHA-256 of the image file's identity

READING is a hash of everything that determines the pixels: the steps of the transform before ToTensor, the decoding,
and the versions of the libraries involved. The later steps (scaling, normalisation) are applied after reading. Results
are therefore bit-identical with and without the cache, and models that normalise differently share it.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from training.data.images import ImageReader
from training.model.weights.fingerprint import probe_images
from training.readers.images import BrokenImageError, Source
from training.runtime.files import atomic_write
from training.runtime.messages import warn_once

FORMAT = 3


def image_key(path: Any) -> bytes:
    """Returns a key that identifies an image file by path, size and modification time."""
    status = path.stat()
    identity = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    return sha256(identity.encode("utf-8", "surrogatepass")).digest()  # a name need not be UTF-8


class CachedReader:
    """Reads image files with a transform and caches their pixels.

    Several processes may share a folder: files are only added, and each is written atomically. A file that can't be
    read or written costs a warning per process.

    Args:
        folder: folder of ``--image-cache``.
        transform: PIL image -> [3, H, W], with torchvision's ToTensor as one of its steps.
        mode: one of `data.images.MODES`.

    Raises:
        ValueError: no step of the transform is ToTensor.
    """

    def __init__(self, folder: str | Path, transform: Callable, mode: str):
        steps = list(getattr(transform, "transforms", []))
        number = next((n for n, step in enumerate(steps) if isinstance(step, transforms.ToTensor)), None)
        if number is None:
            raise ValueError(f"--image-cache: this model's preprocessing has no step ToTensor ({transform}); omit it")
        self.reader = ImageReader(transforms.Compose(steps[:number]), mode)
        self.after = transforms.Compose(steps[number:])
        reading = {
            "format": FORMAT,
            "pixels": [sha256(np.asarray(self.reader(file)).tobytes()).hexdigest() for file in probe_images()],
            "decoding": mode,
            "versions": [version(name) for name in ("pillow", "torchvision")],
        }
        self.folder = Path(folder) / sha256(json.dumps(reading).encode()).hexdigest()[:32]

    def read(self, sources: Sequence[Source]) -> list[torch.Tensor | BrokenImageError]:
        """Reads image files, and adds those that are not in the cache.

        Returns:
            For each file the transformed image, or the error.
        """
        found = []
        for source in sources:
            try:
                found.append(self.after(Image.fromarray(self._pixels(source))))
            except BrokenImageError as error:
                found.append(error)
        return found

    def _pixels(self, source: Any) -> np.ndarray:
        key = image_key(source).hex()
        path = self.folder / key[:2] / f"{key}.npz"
        try:
            if path.exists():
                with np.load(path) as file:
                    return file["pixels"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            why = f"can't be read ({type(error).__name__}); their images are read again"
            warn_once(f"--image-cache: files in {self.folder} {why}")
        pixels = np.asarray(self.reader(source))
        try:
            # Not flushed, which would take longer than reading an image; a zip file has checksums.
            with atomic_write(path, flush=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, pixels=pixels)
        except OSError as error:
            warn_once(
                f"--image-cache: {self.folder} can't be written ({type(error).__name__}); its pixels are not kept"
            )
        return pixels
