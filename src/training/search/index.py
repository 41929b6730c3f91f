"""Stores the vectors of a folder's images on disk, and keeps them up to date with the folder.

    DIR/READING/images.usearch     one vector per image file, float16, in usearch's format
    DIR/READING/paths.arrow        key and path of each file that was listed, in the order of keys
    DIR/READING/unreadable.json    key of each file that is no readable image -> the reason

READING is a hash of the folder, the image tower and the preprocessing, so vectors of different models are never mixed.
A key is a hash of a file's path, size and modification time. The keys show which files are new, changed or deleted,
so the files can't be inconsistent after a crash: the other two are written before the vectors that need them.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pyarrow
import torch

from training.eval.encode import Encoding
from training.eval.feature_cache import describe_image_tower
from training.readers.files import IMAGE_SUFFIXES
from training.runtime.files import atomic_write
from training.runtime.lease import Lease

FORMAT = 3
FILE, PATHS, UNREADABLE = "images.usearch", "paths.arrow", "unreadable.json"
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
    """Lists the image files below a folder. Hidden files and folders are ignored; linked folders are listed once.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains no image file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"IMAGES {folder}: no such folder")
    others: Counter = Counter()
    found: list[tuple[str, os.stat_result]] = []
    real, linked, seen = [os.fspath(folder)], [], set()
    while real or linked:  # links last, so that a folder has its real path if it is below IMAGES
        place = real.pop() if real else linked.pop()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                others["folders linked again"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
        except OSError:
            others["folders that can't be opened"] += 1
            continue
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append(entry.path)
            elif suffix in SUFFIXES and entry.is_file():
                found.append((entry.path, entry.stat()))
            else:
                others[suffix or entry.name] += 1
    if not found:
        raise ValueError(f"IMAGES {folder}: no image file in this folder ({', '.join(sorted(SUFFIXES))})")
    start = len(os.path.join(folder, ""))
    images = {_key(path[start:], status): Path(path) for path, status in sorted(found, key=lambda file: file[0])}
    return FolderContent(images, others)


def _key(name: str, status: os.stat_result) -> int:
    identity = os.fsencode(name) + b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "big")


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
        unreadable = self.path.with_name(UNREADABLE)
        content = json.loads(unreadable.read_text()) if unreadable.is_file() else {}
        self.unreadable: dict[int, str] = {int(key): reason for key, reason in content.items()}

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
            The number of vectors added, the number removed, and for each unreadable file the reason. Unreadable files
            are read again only if they change.

        Raises:
            ValueError: another process is updating the index.
        """
        with Lease() as lease:
            if self.keys | self.unreadable.keys() != images.keys() or not self.path.with_name(PATHS).is_file():
                lease.take(self.path.parent, "--index")
                self._read()  # another process may have saved since
            return self._update(images, encode, save_every, report)

    def _update(self, images: dict[int, Path], encode: Callable, save_every: int, report: Callable) -> tuple:
        known = self.keys
        gone = sorted(known - images.keys())
        new = [key for key in images if key not in known and key not in self.unreadable]
        if gone:
            self._writable(None).remove(np.array(gone, dtype=np.uint64))
            self._save()
        forgotten = self.unreadable.keys() - images.keys()
        self.unreadable = {key: reason for key, reason in self.unreadable.items() if key in images}
        if gone or new or forgotten or not self.path.with_name(PATHS).is_file():
            self._save_paths(images)
        num_broken = 0
        for start in range(0, len(new), save_every):
            keys = new[start : start + save_every]
            found = encode([images[key] for key in keys])
            self.unreadable |= {keys[position]: reason for position, reason in found.broken.items()}
            num_broken += len(found.broken)
            good = [position for position in range(len(keys)) if position not in found.broken]
            if good:
                vectors = found.features[good].numpy()
                self._writable(vectors.shape[1]).add(np.array(keys, dtype=np.uint64)[good], vectors)
                self._save()
            if found.broken or forgotten:
                with atomic_write(self.path.with_name(UNREADABLE)) as temporary:
                    temporary.write_text(json.dumps(self.unreadable))
            report(start + len(keys), len(new))
        return len(new) - num_broken, len(gone), {images[key]: reason for key, reason in self.unreadable.items()}

    def _save_paths(self, images: dict[int, Path]) -> None:
        keys = sorted(images)
        paths = pyarrow.array([os.fsencode(images[key]) for key in keys], pyarrow.large_binary())
        table = pyarrow.table({"key": pyarrow.array(keys, pyarrow.uint64()), "path": paths})
        with atomic_write(self.path.with_name(PATHS)) as temporary:
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

    def paths(self, keys: Sequence[int]) -> list[Path]:
        """Returns the paths of the files with the given keys, without reading the other paths."""
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path.with_name(PATHS)))).read_all()
        rows = np.searchsorted(table["key"].to_numpy(), np.array(keys, dtype=np.uint64))
        return [Path(os.fsdecode(table["path"][int(row)].as_py())) for row in rows]

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
