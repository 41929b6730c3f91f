"""Cache of decoded and resized images on disk, for evaluating several models with the same image size.

    DIR/READING/BATCH.safetensors    pixels [n, H, W, 3] uint8, key [n, 32] (SHA-256 of each image file's identity)

READING is a hash of everything that determines the pixels: the steps of the transform before ToTensor, the decoding,
and the versions of the libraries involved. The later steps (scaling, normalisation) are applied after reading. Results
are therefore bit-identical with and without the cache, and models that normalise differently share it.
"""

import json
import logging
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torchvision import transforms

from training.data.images import ImageReader, Source
from training.model.weights.fingerprint import probe_images
from training.readers.files import EmbeddedImage, ShardMember
from training.readers.images import BrokenImageError
from training.runtime.files import atomic_write

FORMAT = 2
logger = logging.getLogger(__name__)


def image_key(path: Path | ShardMember | EmbeddedImage) -> bytes:
    """Returns a key that identifies an image file by path, size and modification time."""
    status = path.stat()
    identity = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    return sha256(identity.encode("utf-8", "surrogatepass")).digest()  # a name need not be UTF-8


class CachedReader:
    """Reads image files with a transform and caches their pixels.

    Several processes may share a folder: files are only added, and each is written atomically.

    Args:
        folder: folder of ``--image-cache``.
        transform: PIL image -> [3, H, W], with torchvision's ToTensor as one of its steps.
        mode: one of `data.images.MODES`.

    Raises:
        ValueError: the transform can't be split.
    """

    def __init__(self, folder: str | Path, transform: Callable, mode: str):
        before, self.after = split_at_tensor(transform)
        self.reader = ImageReader(before, mode)
        reading = {
            "format": FORMAT,
            "pixels": [sha256(np.asarray(self.reader(file)).tobytes()).hexdigest() for file in probe_images()],
            "decoding": mode,
            "versions": [version(name) for name in ("pillow", "torchvision")],
        }
        self.folder = Path(folder) / sha256(json.dumps(reading).encode()).hexdigest()[:32]
        self.rows: dict[bytes, tuple[Path, int]] = {}  # key of an image -> file and row of its pixels
        self.can_write = True
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "numpy") as file:
                keys = file.get_tensor("key")
        except (SafetensorError, OSError) as error:
            logger.warning(f"--image-cache: {path} can't be read ({error}); its images are read again")
            return
        self.rows |= {key.tobytes(): (path, row) for row, key in enumerate(keys)}

    def read(self, sources: Sequence[Source]) -> list[torch.Tensor | BrokenImageError]:
        """Reads image files, and adds those that are not in the cache.

        Returns:
            For each file the transformed image, or the error.
        """
        found, new = [], {}
        for source in sources:
            key = image_key(source)
            try:
                if key in self.rows:
                    pixels = self._read_cached(*self.rows[key])
                else:
                    pixels = new[key] = np.asarray(self.reader(source))
            except BrokenImageError as error:
                found.append(error)
                continue
            found.append(self.after(Image.fromarray(pixels)))
        if new:
            self._add(new)
        return found

    def _read_cached(self, path: Path, row: int) -> np.ndarray:
        with safe_open(path, "numpy") as file:
            return file.get_slice("pixels")[row]

    def _add(self, new: dict[bytes, np.ndarray]) -> None:
        content = {
            "pixels": torch.from_numpy(np.stack(list(new.values()))),
            "key": torch.from_numpy(np.frombuffer(b"".join(new), dtype=np.uint8).reshape(-1, 32).copy()),
        }
        path = self.folder / f"{sha256(b''.join(new)).hexdigest()[:32]}.safetensors"
        try:
            with atomic_write(path) as temporary:
                save_file(content, temporary)
        except (SafetensorError, OSError) as error:
            if self.can_write:  # said once by each process
                logger.warning(f"--image-cache: {self.folder} can't be written ({error}); its pixels are not kept")
            self.can_write = False
        else:
            self._index(path)


def split_at_tensor(transform: Callable) -> tuple[Callable, Callable]:
    """Splits a transform into the steps before ToTensor and those from ToTensor on.

    Raises:
        ValueError: no step of the transform is ToTensor.
    """
    steps = list(getattr(transform, "transforms", []))
    places = [n for n, step in enumerate(steps) if isinstance(step, transforms.ToTensor)]
    if not places:
        raise ValueError(f"--image-cache: this model's preprocessing has no step ToTensor ({transform}); omit the flag")
    return transforms.Compose(steps[: places[0]]), transforms.Compose(steps[places[0] :])
