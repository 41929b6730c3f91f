"""Encodes image files and captions into features, distributed over all ranks.

The content of a batch does not depend on the number of processes: rank b mod world_size encodes batch b. Every feature
is therefore computed in the same batch, and bit-identical, for any world size.

The cache of decoded and resized images on disk serves evaluations of several models with the same image size:

    DIR/READING/KE/KEY.npz    pixels [H, W, 3] uint8; KEY is the SHA-256 of the image file's identity

READING is a hash of everything that determines the pixels: the steps of the transform before ToTensor, the decoding,
and the versions of the libraries involved. The later steps (scaling, normalisation) are applied after reading. Results
are therefore bit-identical with and without the cache, and models that normalise differently share it.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm import tqdm

from training.data.images import IN_EVALUATION, ImageReader
from training.model.assembly.factory import EncoderParts
from training.model.tokenizers import tokenise_and_count_lost
from training.model.towers.encoders import PADDING_MULTIPLE, cut_padding, image_encoder, text_encoder
from training.model.weights.fingerprint import probe_images
from training.readers.files import StoredImage
from training.readers.images import BrokenImageError, Source
from training.runtime.distributed import DistEnv, gather_objects, join_rows, stop_on_every_rank, sum_over_ranks
from training.runtime.files import atomic_write
from training.runtime.messages import warn_once
from training.runtime.processes import SIGNALS
from training.runtime.workers import Loader

PIXEL_FORMAT = 3  # part of the hash: after a change, old files are not used
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeOptions:
    """How to run a tower.

    Attributes:
        batch_size: number of images per batch.
        workers: number of loader processes.
        precision: precision, by open_clip's names.
        sort_texts: batch captions of similar length, and pad each batch only to its longest caption.
        text_batch_size: number of captions per batch; None uses `batch_size`.
        image_decoding: one of `data.images.MODES`.
        image_cache: folder of decoded pixels, see `CachedReader`; None does not cache.
        feature_cache: folder of features, see `caches.FeatureCache`, read and extended; None does not cache.
        allow_broken: report unreadable files in the result instead of raising.
    """

    batch_size: int = 64
    workers: int = 4
    precision: str = "fp32"
    sort_texts: bool = True
    text_batch_size: int | None = None
    image_decoding: str = "exact"
    image_cache: str | None = None
    feature_cache: str | None = None
    allow_broken: bool = False

    @classmethod
    def from_flags(cls, args: argparse.Namespace, **others: Any) -> "ComputeOptions":
        """Returns the options that the flags of an evaluation ask for, with some `others`."""
        sort, decoding = args.text_packing != "padded", args.image_decoding or IN_EVALUATION
        flags = (args.batch_size, args.workers, args.precision, sort, args.text_batch_size, decoding, args.image_cache)
        return cls(*flags, **others)


@dataclass(frozen=True)
class Encoding:
    """Features of all items, complete on every rank.

    Attributes:
        features: [num_items, dim] float32 on the CPU, L2-normalised; zeros for a broken item.
        broken: index of each item that could not be read -> the reason.
        lost_tokens: [num_items] int64, number of tokens that the tokenizer cut off (zeros for images).
    """

    features: torch.Tensor
    broken: dict[int, str]
    lost_tokens: torch.Tensor


class Batch(NamedTuple):
    """A loader's batch: `inputs` of the items at `positions`, and the reasons for items that are `broken`."""

    positions: list[int]
    inputs: torch.Tensor | None
    broken: dict[int, str]
    lost_tokens: torch.Tensor | int


class Batches(Dataset):
    """Data set whose item n is what `load` makes of the positions in `positions[n]`."""

    def __init__(self, positions: list[list[int]], load: Callable[[list[int]], Batch]):
        self.positions, self.load = positions, load

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Batch:
        return self.load(self.positions[number])


def _load_images(paths: Sequence[Path | StoredImage], read: Callable, positions: list[int]) -> Batch:
    """Returns a batch of pixels [n, 3, H, W] of the readable files."""
    pixels: dict[int, torch.Tensor] = {}
    broken: dict[int, str] = {}
    for position in positions:
        try:
            pixels[position] = read(paths[position])
        except BrokenImageError as error:
            broken[position] = str(error)
    return Batch(list(pixels), torch.stack(list(pixels.values())) if pixels else None, broken, 0)


def _load_texts(
    texts: Sequence[str], tokenizer: Callable, count_lost: bool, cut: Callable, positions: list[int]
) -> Batch:
    """Returns a batch of token ids [n, seq_len] without the padding that `cut` removes."""
    chosen = [texts[position] for position in positions]
    ids, lost = tokenise_and_count_lost(tokenizer, chosen) if count_lost else (tokenizer(chosen), [0] * len(chosen))
    return Batch(positions, cut(ids), {}, torch.tensor(lost))


@dataclass(frozen=True)
class Encoder:
    """Encodes image files and captions; each rank encodes its share and gets all features.

    Attributes:
        parts: a model in eval mode on `env.device`, with its preprocessing and tokenizer.
        env: this process.
        options: batch size, workers, precision and others.
    """

    parts: EncoderParts
    env: DistEnv
    options: ComputeOptions = ComputeOptions()

    def images(self, paths: Sequence[Path | StoredImage], without_head: bool = False) -> Encoding:
        """Encodes image files.

        Args:
            paths: distinct files.
            without_head: return features before the image tower's `linear_head`, if it has one.

        Raises:
            BrokenImageError: a file can't be read, unless allowed; raised on all ranks.
            FloatingPointError: the model returned NaN or infinity.
        """
        tower = image_encoder(self.parts.model, without_head)
        return self._encode(tower, self.load_images(paths), len(paths), "image")

    def load_images(self, paths: Sequence[Path | StoredImage]) -> Iterator[Batch]:
        """Yields this rank's batches of pixels."""
        options = self.options
        reader: Any = ImageReader(self.parts.preprocess, options.image_decoding)
        if options.image_cache:
            reader = CachedReader(options.image_cache, self.parts.preprocess, options.image_decoding)
        load = partial(_load_images, paths, reader)
        return self._load(range(len(paths)), options.batch_size, load, "image")

    def texts(
        self, texts: Sequence[str], tokenizer: Callable | None = None, count_lost: bool = True, normalise: bool = True
    ) -> Encoding:
        """Encodes captions. Padding is cut off where it does not affect the features.

        Args:
            texts: captions.
            tokenizer: list of texts -> token ids [n, seq_len]; None uses the model's.
            count_lost: count the tokens that the tokenizer cuts off.
            normalise: return L2-normalised features.

        Raises:
            TypeError: the tokenizer's truncated tokens can't be counted.
            FloatingPointError: the model returned NaN or infinity.
        """
        order: Sequence[int] = range(len(texts))
        encoder: Any = self.parts.model.encode_text
        pad_id = None
        if self.options.sort_texts:
            # The number of characters approximates that of tokens, which is not known yet. Longest first, so that
            # running out of memory happens immediately.
            order = sorted(order, key=lambda i: -len(texts[i]))
            encoder = text_encoder(self.parts.model)
            pad_id = encoder.pad_id
        cut = partial(cut_padding, pad_id=pad_id, multiple=1 if self.env.device.type == "cpu" else PADDING_MULTIPLE)
        load = partial(_load_texts, texts, tokenizer or self.parts.tokenizer, count_lost, cut)
        batches = self._load(order, self.options.text_batch_size or self.options.batch_size, load, "text")
        return self._encode(encoder, batches, len(texts), "text", normalise)

    def _encode(
        self, tower: Callable, batches: Iterator[Batch], num_items: int, unit: str, normalise: bool = True
    ) -> Encoding:
        features: list[tuple[list[int], torch.Tensor]] = []
        broken: dict[int, str] = {}
        lost_tokens = torch.zeros(num_items, dtype=torch.int64)
        for batch in batches:
            if SIGNALS.name:  # during training, a signal must not wait for the end of the evaluation
                break
            broken.update(batch.broken)
            if batch.broken and not self.options.allow_broken:
                reason = next(iter(batch.broken.values()))
                raise BrokenImageError(f"{reason}; replace the file, or add --allow-missing to skip it")
            if batch.inputs is not None:
                rows = run_tower(tower, batch.inputs, self.env.device, self.options.precision, normalise)
                features.append((batch.positions, rows))
                lost_tokens[batch.positions] = batch.lost_tokens
        stop_on_every_rank(self.env)
        broken = dict(sorted(item for of_rank in gather_objects(broken, self.env) for item in of_rank.items()))
        if broken and self.env.is_main:
            logger.warning(f"{len(broken):,} {unit}s can't be read and are skipped; the first: {broken[min(broken)]}")
        return Encoding(join_rows(features, num_items, self.env), broken, sum_over_ranks(lost_tokens, self.env))

    def _load(self, order: Sequence[int], batch_size: int, load: Callable, unit: str) -> Iterator[Batch]:
        """Yields this rank's batches, loaded by worker processes, with a progress bar of items on rank 0."""
        starts = range(0, len(order), batch_size)[self.env.rank :: self.env.world_size]
        dataset = Batches([list(order[start : start + batch_size]) for start in starts], load)
        loader = Loader(dataset, min(self.options.workers, len(dataset)), pin=self.env.device.type == "cuda")
        of_ranks = f" (rank 0 of {self.env.world_size})" if self.env.world_size > 1 else ""
        # No bar for short work, and few lines in a log file.
        how = {"delay": 2, "mininterval": 0.5 if sys.stderr.isatty() else 30, "disable": not self.env.is_main}
        with tqdm(desc=f"encode {unit}s{of_ranks}", total=sum(map(len, dataset.positions)), unit=unit, **how) as bar:
            for batch in loader:
                yield batch
                bar.update(len(batch.positions) + len(batch.broken))


@torch.no_grad()
def run_tower(
    tower: Callable, inputs: torch.Tensor, device: torch.device, precision: str, normalise: bool = True
) -> torch.Tensor:
    """Runs a tower; returns features [n, dim], L2-normalised unless asked otherwise, float32 on the CPU.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    dtype = get_input_dtype(precision) if inputs.is_floating_point() else None
    with get_autocast(precision, device_type=device.type)():
        features = tower(inputs.to(device, dtype, non_blocking=True)).float()
    # Normalised in fp32 even if the tower runs in 16 bits, because rounding here would reduce R@1.
    features = (torch.nn.functional.normalize(features, dim=-1) if normalise else features).cpu()
    if not features.isfinite().all():
        remedy = "try --precision fp32"
        if precision == "fp32":
            remedy = "the weights are broken, or their training diverged; no flag can fix this"
        raise FloatingPointError(f"the model returned NaN or infinity in {precision}; {remedy}")
    return features


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
            "format": PIXEL_FORMAT,
            "pixels": [sha256(np.asarray(self.reader(file)).tobytes()).hexdigest() for file in probe_images()],
            "decoding": mode,
            "versions": [version(name) for name in ("pillow", "torchvision")],
        }
        self.folder = Path(folder) / sha256(json.dumps(reading).encode()).hexdigest()[:32]

    def __call__(self, source: Source) -> torch.Tensor:
        """Returns the transformed image of a file, which is added to the cache if it is not there."""
        return self.after(Image.fromarray(self._pixels(source)))

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
