"""Stores the vectors of a folder's images on disk, and keeps them up to date with the folder.

    DIR/READING/images.usearch    one vector per image file, float16, in usearch's format

READING is a hash of the folder, the image tower and the preprocessing, so vectors of different models are never mixed.
A vector's key is a hash of its file's path, size and modification time. The keys show which files are new, changed or
deleted, so there is no second file that could be inconsistent with this one after a crash.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from training.eval.encode import Encoding
from training.eval.feature_cache import describe_image_tower
from training.eval.image_cache import image_key
from training.readers.files import IMAGE_SUFFIXES
from training.runtime.files import atomic_write
from training.runtime.lease import Lease

FORMAT = 2
FILE = "images.usearch"
SUFFIXES = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
EXACT_UP_TO = 200_000  # number of images up to which every vector is compared; beyond, usearch's graph is searched
_EXPANSION = 512  # number of candidates that a search in the graph keeps


@dataclass(frozen=True)
class FolderContent:
    """The files in a folder.

    Attributes:
        images: key of each image file -> its path, in the order of paths.
        others: suffix -> number of other files.
    """

    images: dict[int, Path]
    others: Counter


def list_images(folder: Path) -> FolderContent:
    """Lists the image files below a folder. Hidden files and folders are ignored.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains no image file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"IMAGES {folder}: no such folder")
    images, others = {}, Counter()
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                others[path.suffix.lower() or path.name] += 1
            else:
                images.setdefault(int.from_bytes(image_key(path)[:8], "big"), path)
    if not images:
        raise ValueError(f"IMAGES {folder}: no image file in this folder ({', '.join(sorted(SUFFIXES))})")
    return FolderContent(images, others)


def index_path(index: Path, images: Path, model: torch.nn.Module, preprocess: Callable, reading: dict) -> Path:
    """Returns the path of the file with the vectors of one folder and one image tower.

    Args:
        index: folder of ``--index``.
        images: the folder of images.
        model, preprocess: the model with the image tower ``visual``, and its preprocessing.
        reading: the precision and the image decoding, see `describe_image_tower`.
    """
    own = {"format": FORMAT, "images": os.fsencode(images.resolve()).hex()}
    own |= describe_image_tower(model, preprocess, **reading)
    return index / sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32] / FILE


class ImageIndex:
    """Vectors by key, searched by cosine similarity.

    Args:
        path: result of `index_path`; the file is read if it exists.

    Raises:
        ValueError: usearch is not installed, or the file is broken.
    """

    def __init__(self, path: Path):
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ValueError("training.search needs one more package: pip install usearch") from error
        self._make = Index
        self.path, self._index = path, None
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            try:
                # A view reads only what a search needs from the file; it can't be modified.
                self._index = self._make.restore(str(self.path), view=True)
            except Exception as error:  # usearch's errors have no common base
                raise ValueError(f"--index: {self.path} can't be read ({error}); remove it") from error
            if self._index is None:
                raise ValueError(f"--index: {self.path} is not a usearch index; remove it")
        self._is_view = True

    def __len__(self) -> int:
        return 0 if self._index is None else len(self._index)

    @property
    def keys(self) -> set[int]:
        """The keys of all vectors."""
        return set() if self._index is None else set(np.asarray(self._index.keys).tolist())

    def update(
        self,
        images: dict[int, Path],
        encode: Callable[[Sequence[Path]], Encoding],
        save_every: int,
        report: Callable[[int, int], None],
    ) -> tuple[int, int, dict[Path, str]]:
        """Encodes new and changed files, removes deleted ones, and saves.

        Args:
            images: `FolderContent.images`.
            encode: files -> their features.
            save_every: number of files between two saves, the most that a killed run has to repeat.
            report: called after each save with the number of files done and the total number.

        Returns:
            The number of vectors added, the number removed, and for each unreadable file the reason.

        Raises:
            ValueError: another process is updating the index.
        """
        with Lease() as lease:
            if self.keys != images.keys():
                lease.take(self.path.parent, "--index")
                self._read()  # another process may have saved since
            return self._update(images, encode, save_every, report)

    def _update(self, images: dict[int, Path], encode: Callable, save_every: int, report: Callable) -> tuple:
        known = self.keys
        gone, new = sorted(known - images.keys()), [key for key in images if key not in known]
        if gone:
            self._writable(None).remove(np.array(gone, dtype=np.uint64))
            self._save()
        broken: dict[Path, str] = {}
        for start in range(0, len(new), save_every):
            keys = new[start : start + save_every]
            paths = [images[key] for key in keys]
            found = encode(paths)
            broken |= {paths[position]: reason for position, reason in found.broken.items()}
            good = [position for position in range(len(keys)) if position not in found.broken]
            if good:
                vectors = found.features[good].numpy()
                self._writable(vectors.shape[1]).add(np.array(keys, dtype=np.uint64)[good], vectors)
                self._save()
            report(start + len(keys), len(new))
        return len(new) - len(broken), len(gone), broken

    def _writable(self, dim: int | None) -> object:
        if self._index is None:
            self._index = self._make(ndim=dim, metric="cos", dtype="f16")
        elif self._is_view:
            self._index = self._make.restore(str(self.path), view=False)
        self._is_view = False
        return self._index

    def _save(self) -> None:
        with atomic_write(self.path) as temporary:
            self._index.save(str(temporary))

    def search(self, query: torch.Tensor, top: int) -> list[tuple[int, float]]:
        """Returns the keys of the nearest vectors and their cosines, best first.

        Args:
            query: [dim], L2-normalised.
            top: number of results; all vectors if there are fewer.
        """
        if not len(self):
            return []
        self._index.expansion_search = _EXPANSION
        found = self._index.search(query.numpy(), min(top, len(self)), exact=self.is_exact)
        return [(int(key), 1 - float(distance)) for key, distance in zip(found.keys, found.distances)]

    @property
    def is_exact(self) -> bool:
        """Whether a search compares the query with all vectors."""
        return len(self) <= EXACT_UP_TO

    def vectors(self, keys: Sequence[int]) -> np.ndarray:
        """Returns the vectors of the given keys, [len(keys), dim] float32."""
        return np.asarray(self._index.get(np.array(keys, dtype=np.uint64), dtype=np.float32))
