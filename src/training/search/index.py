"""Stores the vectors of a folder's images on disk, and keeps them up to date with the folder.

    DIR/READING/images.arrow    a row for each image: key, path, and vector in float16; in its metadata, the key of each
                                file that is no readable image, with the reason

READING is a hash of the folder, the image tower and the preprocessing, so vectors of different models are never mixed.
A key is a hash of a file's path, size and modification time; keys show which files are new, changed or deleted.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import torch

from training.eval.caches import describe_image_tower
from training.eval.encode import ComputeOptions, Encoder
from training.flags.model import tokenizer_arguments
from training.model.assembly.factory import EncoderParts, check_vocabulary, create_model_and_transforms, get_tokenizer
from training.model.assembly.from_flags import find_weights
from training.readers.files import IMAGE_SUFFIXES, upright
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, check_device
from training.runtime.files import atomic_write
from training.runtime.lease import Lease

FORMAT = 4
FILE, UNREADABLE = "images.arrow", b"unreadable"
BLOCK_SIZE = 1024  # number of vectors that a search compares at once, so that they stay in the cache


class FolderContent(NamedTuple):
    """The files in a folder.

    Attributes:
        images: key of each image file -> its path.
        others: suffix -> number of other files.
    """

    images: dict[int, str]
    others: Counter


def list_images(folder: Path) -> FolderContent:
    """Lists the image files below a folder. Hidden files and folders are ignored; linked folders are listed once.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains no image file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"IMAGES {folder}: no such folder")
    images: dict[int, str] = {}
    others: Counter = Counter()
    real = [os.fspath(folder)]
    linked: list[str] = []
    seen = set()
    start = len(os.path.join(folder, ""))
    while real or linked:  # links last, so that a folder has its real path if it is below IMAGES
        directory = real.pop() if real else linked.pop()
        try:
            status = os.stat(directory)
            entries = os.scandir(directory)
        except OSError:
            others["folders that can't be opened"] += 1
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            others["folders linked again"] += 1
            continue
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            stem, _, suffix = entry.name.rpartition(".")
            if stem and suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
                status = entry.stat()
                name_and_time = os.fsencode(entry.path[start:]) + b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)
                images[int.from_bytes(blake2b(name_and_time, digest_size=8).digest(), "big")] = entry.path
            elif entry.is_dir():
                (linked if entry.is_symlink() else real).append(entry.path)
            else:
                others[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
    if not images:
        raise ValueError(f"IMAGES {folder}: no image file in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return FolderContent(images, others)


def index_path(index: Path, images: Path, encoder: Encoder) -> Path:
    """Returns the path of the file with the vectors of one folder and one image tower.

    Args:
        index: folder of ``--index``.
        images: the folder of images.
        encoder: the model and how it reads images.
    """
    described = {"format": FORMAT, "images": os.fsencode(images.resolve()).hex()}
    described |= describe_image_tower(encoder)
    return index / sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32] / FILE


class ImageIndex:
    """Vectors of images, searched by cosine similarity.

    Args:
        path: result of `index_path`; the file is read if it exists.

    Attributes:
        table: columns ``key``, ``path`` and ``vector``; only ``key`` if there is no image.
        unreadable: key of each file that is no readable image -> the reason.

    Raises:
        ValueError: the file is broken.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read()

    def _read(self) -> None:
        self.table, self.unreadable = pyarrow.table({"key": pyarrow.array([], pyarrow.uint64())}), {}
        if self.path.is_file():
            try:
                # In a memory map, only what is used is read.
                self.table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))).read_all()
                found = json.loads(self.table.schema.metadata[UNREADABLE])
            except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"--index: {self.path} can't be read ({error}); remove it") from error
            self.unreadable = {int(key): reason for key, reason in found.items()}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def keys(self) -> set[int]:
        """The keys of all vectors."""
        return set(self.table["key"].to_numpy().tolist())

    def update(self, images: dict[int, str], encoder: Encoder, save_every: int) -> tuple[int, int, dict[str, str]]:
        """Encodes new and changed files, removes deleted ones, and saves; each save of new vectors prints a line.

        Args:
            images: `FolderContent.images`.
            encoder: the model.
            save_every: number of files between two saves, the most that a killed run has to repeat.

        Returns:
            The number of vectors added, the number removed, and for each unreadable file the reason. Unreadable files
            are read again only if they change.

        Raises:
            ValueError: another process is updating the index.
        """
        num_added = num_gone = 0
        if self.keys | self.unreadable.keys() != images.keys():
            with Lease() as lease:
                lease.take(self.path.parent, "--index")
                self._read()  # another process may have saved since
                kept = [key in images for key in self.table["key"].to_numpy().tolist()]
                num_gone = kept.count(False)
                self.table = self.table.filter(pyarrow.array(kept, pyarrow.bool_()))
                self.unreadable = {key: reason for key, reason in self.unreadable.items() if key in images}
                new = sorted(images.keys() - self.keys - self.unreadable.keys(), key=images.__getitem__)
                for start in range(0, len(new), save_every):
                    keys = new[start : start + save_every]
                    num_added += self._add(keys, [images[key] for key in keys], encoder)
                    print(f"Encoded {start + len(keys):,} of {len(new):,} new images; saved.", flush=True)
                if not new:
                    self._save()
        return num_added, num_gone, {images[key]: reason for key, reason in self.unreadable.items()}

    def _add(self, keys: Sequence[int], paths: Sequence[str], encoder: Encoder) -> int:
        """Encodes files and saves them; returns the number of readable ones."""
        found = encoder.images([upright(Path(path)) for path in paths])
        self.unreadable |= {keys[number]: reason for number, reason in found.broken.items()}
        good = [number for number in range(len(keys)) if number not in found.broken]
        columns = {"key": pyarrow.array([keys[n] for n in good], pyarrow.uint64())}
        if good:
            vectors = found.features[good].half().numpy()
            columns["path"] = pyarrow.array([os.fsencode(paths[n]) for n in good], pyarrow.large_binary())
            columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        tables = [table for table in (self.table, pyarrow.table(columns)) if len(table)]
        self.table = pyarrow.concat_tables(tables) if tables else self.table
        self._save()
        return len(good)

    def _save(self) -> None:
        self.table = self.table.replace_schema_metadata({UNREADABLE: json.dumps(self.unreadable)}).combine_chunks()
        with atomic_write(self.path) as temporary, pyarrow.OSFile(str(temporary), "wb") as sink:
            with pyarrow.ipc.new_file(sink, self.table.schema) as writer:
                writer.write_table(self.table)

    def vectors(self) -> Iterator[torch.Tensor]:
        """Yields the vectors of all images in blocks, [n, dim] float32."""
        for chunk in self.table["vector"].chunks if len(self) else ():
            vectors = chunk.flatten().to_numpy().reshape(len(chunk), -1)
            for start in range(0, len(vectors), BLOCK_SIZE):
                # A copy, because a memory map is read-only; torch converts ten times as fast as NumPy.
                yield torch.from_numpy(vectors[start : start + BLOCK_SIZE].copy()).float()

    def paths(self, rows: Sequence[int]) -> list[Path]:
        """Returns the paths of images, without reading the other paths."""
        return [Path(os.fsdecode(self.table["path"][int(row)].as_py())) for row in rows]

    def search(self, query: torch.Tensor, top: int) -> list[tuple[Path, float]]:
        """Returns the nearest images and their cosines, best first.

        Args:
            query: [dim], L2-normalised.
            top: number of results; all images if there are fewer.
        """
        cosine = torch.cat([block @ query for block in self.vectors()])
        best = cosine.topk(min(top, len(cosine)))
        return list(zip(self.paths(best.indices.tolist()), best.values.tolist()))


def make_encoder(args: argparse.Namespace) -> Encoder:
    """Builds the model that the flags of `training.search` ask for.

    Raises:
        ValueError, FileNotFoundError: see `factory.create_model`.
    """
    device = check_device(args.device)
    find_weights(args, device, "its results are random")
    overrides: Any = tokenizer_arguments(vars(args))
    tokenizer = get_tokenizer(args.model, **overrides)
    torch.manual_seed(0)  # an untrained model has the same weights in every call
    model, train_transform, preprocess = create_model_and_transforms(
        args.model, args.pretrained, args.precision, device, **overrides
    )
    check_vocabulary(args.model, model, tokenizer)
    options = ComputeOptions(args.batch_size, args.workers, args.precision, allow_broken=True)
    return Encoder(EncoderParts(model.eval(), preprocess, tokenizer, train_transform), DistEnv(0, 1, device), options)


def encode_query(encoder: Encoder, query: str | Path) -> tuple[torch.Tensor, str]:
    """Encodes a text, or an image file, which is turned upright.

    Returns:
        The features [dim], and a note if the text was truncated (otherwise an empty string).

    Raises:
        BrokenImageError: the file can't be read.
    """
    if isinstance(query, Path):
        found = encoder.images([upright(query)])
        if found.broken:
            raise BrokenImageError(f"--image: {found.broken[0]}")
        return found.features[0], ""
    found = encoder.texts([query])
    tokenizer: Any = encoder.parts.tokenizer
    lost, length = int(found.lost_tokens[0]), tokenizer.context_length
    note = f"Query: truncated to the model's {length:,} tokens; the last {lost:,} tokens are ignored." if lost else ""
    return found.features[0], note
