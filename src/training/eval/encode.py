"""Encodes image files and captions into features, distributed over all ranks.

The content of a batch does not depend on the number of processes: rank b mod world_size encodes batch b. Every feature
is therefore computed in the same batch, and bit-identical, for any world size.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch.utils.data import Dataset
from tqdm import tqdm

from training.data.images import ImageReader
from training.eval.image_cache import CachedReader
from training.model.tokenizers.truncation import tokenise_and_count_lost
from training.model.towers.image_encoder import image_encoder
from training.model.towers.text_encoder import cut_padding, text_encoder
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, join_rows, merge_over_ranks, stop_together, sum_over_ranks
from training.runtime.stop import SIGNALS
from training.runtime.workers import Loader

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
        image_cache: folder of decoded pixels, see `image_cache`; None does not cache.
    """

    batch_size: int = 64
    workers: int = 4
    precision: str = "fp32"
    sort_texts: bool = True
    text_batch_size: int | None = None
    image_decoding: str = "exact"
    image_cache: str | None = None


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


class ImageBatches(Dataset):
    """Data set whose item b is the pixels [n, 3, H, W] of the readable files in `batches[b]`.

    Args:
        paths: all files.
        read: files -> for each file its pixels, or the error.
        batches: indices into `paths`.
    """

    def __init__(self, paths: Sequence[Path], read: Callable, batches: list[list[int]]):
        self.paths, self.read, self.batches = paths, read, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        found = dict(zip(self.batches[number], self.read([self.paths[p] for p in self.batches[number]])))
        broken = {position: str(error) for position, error in found.items() if isinstance(error, BrokenImageError)}
        positions = [position for position in found if position not in broken]
        pixels = torch.stack([found[position] for position in positions]) if positions else None
        return Batch(positions, pixels, broken, 0)


class TextBatches(Dataset):
    """Data set whose item b is the token ids [n, seq_len] of the captions in `batches[b]`, without common padding."""

    def __init__(
        self, texts: Sequence[str], tokenizer: Callable, batches: list[list[int]], pad_id: int | None, count_lost: bool
    ):
        self.texts, self.tokenizer, self.batches = texts, tokenizer, batches
        self.pad_id, self.count_lost = pad_id, count_lost

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        texts = [self.texts[position] for position in self.batches[number]]
        if self.count_lost:
            ids, lost = tokenise_and_count_lost(self.tokenizer, texts)
        else:
            ids, lost = self.tokenizer(texts), [0] * len(texts)
        return Batch(self.batches[number], cut_padding(ids, self.pad_id), {}, torch.tensor(lost))


def image_batches(preprocess: Callable, paths: Sequence[Path], env: DistEnv, options: ComputeOptions) -> ImageBatches:
    """Returns this rank's batches of image files, read with a transform; see `encode_images` for the arguments."""
    reader = ImageReader(preprocess, options.image_decoding)
    if options.image_cache:
        reader = CachedReader(options.image_cache, preprocess, options.image_decoding)
    return ImageBatches(paths, reader.read, _own_batches(range(len(paths)), env, options.batch_size))


def encode_images(
    model: torch.nn.Module,
    preprocess: Callable,
    paths: Sequence[Path],
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
    without_head: bool = False,
) -> Encoding:
    """Encodes image files with `model.encode_image`; each rank encodes its share and gets all features.

    Args:
        model: any open_clip model on `env.device`, in eval mode.
        preprocess: PIL image -> float tensor [3, H, W].
        paths: distinct files.
        env: this process.
        options: batch size, workers, precision.
        allow_broken: report unreadable files in the result instead of raising.
        without_head: return features before the image tower's `linear_head`, if it has one.

    Raises:
        BrokenImageError: a file can't be read, unless allowed; raised on all ranks.
        FloatingPointError: the model returned NaN or infinity.
    """
    dataset = image_batches(preprocess, paths, env, options)
    return _encode(image_encoder(model, without_head), dataset, len(paths), "image", env, options, allow_broken)


def encode_texts(
    model: torch.nn.Module,
    tokenizer: Callable,
    texts: Sequence[str],
    env: DistEnv,
    options: ComputeOptions,
    count_lost: bool = True,
) -> Encoding:
    """Encodes captions; each rank encodes its share and gets all features.

    Padding is cut off where it does not affect the features.

    Args:
        model: any open_clip model on `env.device`, in eval mode.
        tokenizer: list of texts -> token ids [n, seq_len].
        texts: distinct captions.
        env: this process.
        options: batch size, workers, precision.
        count_lost: count the tokens that the tokenizer cuts off.

    Raises:
        TypeError: the tokenizer's truncated tokens can't be counted.
        FloatingPointError: the model returned NaN or infinity.
    """
    order = range(len(texts))
    if options.sort_texts:
        # The number of characters approximates that of tokens, which is not known yet. Longest first, so that running
        # out of memory happens immediately.
        order = sorted(order, key=lambda i: -len(texts[i]))
    batches = _own_batches(order, env, options.text_batch_size or options.batch_size)
    encoder = text_encoder(model)
    pad_id = encoder.pad_id if options.sort_texts else None
    dataset = TextBatches(texts, tokenizer, batches, pad_id, count_lost)
    return _encode(encoder if options.sort_texts else model.encode_text, dataset, len(texts), "text", env, options)


def _own_batches(order: Sequence[int], env: DistEnv, batch_size: int) -> list[list[int]]:
    starts = range(0, len(order), batch_size)
    return [list(order[s : s + batch_size]) for s in starts[env.rank :: env.world_size]]


def _encode(
    tower: Callable,
    dataset: ImageBatches | TextBatches,
    num_items: int,
    unit: str,
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
) -> Encoding:
    features: list[tuple[list[int], torch.Tensor]] = []
    broken: dict[int, str] = {}
    lost_tokens = torch.zeros(num_items, dtype=torch.int64)
    for batch in load_batches(dataset, unit, env, options):
        if SIGNALS.name:  # during training, a signal must not wait for the end of the evaluation
            break
        broken.update(batch.broken)
        if batch.broken and not allow_broken:
            reason = next(iter(batch.broken.values()))
            raise BrokenImageError(f"{reason}; replace the file, or add --allow-missing to skip it")
        if batch.positions:
            features.append((batch.positions, run_tower(tower, batch.inputs, env.device, options.precision)))
            lost_tokens[batch.positions] = batch.lost_tokens
    stop_together(env)

    broken = merge_over_ranks(broken, env)
    if broken and env.is_main:
        logger.warning(f"{len(broken):,} {unit}s can't be read and are skipped; the first: {broken[min(broken)]}")
    return Encoding(join_rows(features, num_items, env), broken, sum_over_ranks(lost_tokens, env))


def load_batches(
    dataset: ImageBatches | TextBatches, unit: str, env: DistEnv, options: ComputeOptions
) -> Iterator[Batch]:
    """Yields batches loaded by worker processes, with a progress bar of items on rank 0.

    Args:
        dataset: this rank's batches.
        unit: name of an item in the progress bar.
        env: this process.
        options: number of workers.
    """
    loader = Loader(dataset, min(options.workers, len(dataset)), pin=env.device.type == "cuda")
    share = f" (rank 0 of {env.world_size})" if env.world_size > 1 else ""
    with tqdm(
        desc=f"encode {unit}s{share}",
        total=sum(len(batch) for batch in dataset.batches),
        unit=unit,
        delay=2,  # no bar for short work
        mininterval=0.5 if sys.stderr.isatty() else 30,  # few lines in a log file
        disable=not env.is_main,
    ) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch.positions) + len(batch.broken))


@torch.no_grad()
def run_tower(tower: Callable, inputs: torch.Tensor, device: torch.device, precision: str) -> torch.Tensor:
    """Runs a tower; returns L2-normalised features [n, dim], float32 on the CPU.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    dtype = get_input_dtype(precision) if inputs.is_floating_point() else None
    with get_autocast(precision, device_type=device.type)():
        features = tower(inputs.to(device, dtype, non_blocking=True))
    # Normalised in fp32 even if the tower runs in 16 bits, because rounding here would reduce R@1.
    features = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    if not features.isfinite().all():
        remedy = "try --precision fp32"
        if precision == "fp32":
            remedy = "the weights are broken, or their training diverged; no flag can fix this"
        raise FloatingPointError(f"the model returned NaN or infinity in {precision}; {remedy}")
    return features
