"""From image files and captions to features, divided over all ranks.

Work is divided by whole batches whose content does not depend on the number of processes: batch b goes to rank
b mod world_size. So every feature is computed in the same company, and is the same to the last bit, for any world size.
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

from dataloaders.images import BrokenImageError
from training.data.images import PictureReader
from training.eval.image_cache import CachedReader
from training.model.locking import image_encoder_without_head
from training.model.text_encoder import cut_padding, text_encoder
from training.model.truncation import tokenise_and_count_lost
from training.runtime.distributed import DistEnv, max_over_ranks, merge_over_ranks, raise_together, sum_over_ranks
from training.runtime.stop import SIGNALS
from training.runtime.workers import Loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeOptions:
    """How to run a tower.

    Attributes:
        batch_size: images per step.
        workers: loader processes.
        precision: by open_clip's names.
        sort_texts: put captions of about the same length into a batch, and pad it to its longest only.
        text_batch_size: captions per step; None takes `batch_size`.
        image_decoding: one of `data.images.MODES`.
        image_cache: folder of pixels, see `image_cache`.
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
        broken: item -> why it could not be read.
        lost_tokens: [num_items] int64, tokens that the tokenizer cut off (zeros for images).
    """

    features: torch.Tensor
    broken: dict[int, str]
    lost_tokens: torch.Tensor


class Batch(NamedTuple):
    """What a loader hands to a tower: `inputs` of the items at `positions`; `broken` holds those left out."""

    positions: list[int]
    inputs: torch.Tensor | None
    broken: dict[int, str]
    lost_tokens: torch.Tensor | int


class ImageBatches(Dataset):
    """Item b: the pixels [n, 3, H, W] of the readable files among `batches[b]`.

    Args:
        paths: all files.
        read: files -> per file its pixels, or why it can't be read.
        batches: positions in `paths`.
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
    """Item b: the token ids [n, seq_len] of the captions in `batches[b]`; padding of `pad_id` is cut off."""

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
    """Returns this rank's share of image files, read through a transform; arguments as `encode_images`."""
    reader = PictureReader(preprocess, options.image_decoding)
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
    """Encodes image files with `model.encode_image`; each rank does its share and gets all features.

    Args:
        model: any open_clip model on `env.device`, in eval mode.
        preprocess: PIL image -> float tensor [3, H, W].
        paths: distinct files.
        env: this process.
        options: batch size, workers, precision.
        allow_broken: report unreadable files in the result instead of raising.
        without_head: leave out the image tower's `linear_head`, if it has one.

    Raises:
        BrokenImageError: on all ranks, naming the first unreadable file, unless allowed.
        FloatingPointError: the model returned NaN or infinity.
    """
    dataset = image_batches(preprocess, paths, env, options)
    tower = image_encoder_without_head(model) if without_head else model.encode_image
    return _encode(tower, dataset, len(paths), "image", env, options, allow_broken)


def encode_texts(
    model: torch.nn.Module,
    tokenizer: Callable,
    texts: Sequence[str],
    env: DistEnv,
    options: ComputeOptions,
    count_lost: bool = True,
) -> Encoding:
    """Encodes captions, without their padding where the text tower ignores it; each rank does its share and gets all.

    Args:
        model: any open_clip model on `env.device`, in eval mode.
        tokenizer: list of texts -> token ids [n, seq_len].
        texts: distinct captions.
        env: this process.
        options: batch size, workers, precision.
        count_lost: count the tokens that the tokenizer cuts off.

    Raises:
        TypeError: a tokenizer whose cut tokens can't be counted.
        FloatingPointError: the model returned NaN or infinity.
    """
    order = range(len(texts))
    if options.sort_texts:
        # Characters stand for tokens, which are not known yet. Longest first: what does not fit a device shows at once.
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
    error = None
    try:
        for batch in load_batches(dataset, unit, env, options):
            SIGNALS.check()  # in the middle of a training, a signal must not wait for the whole evaluation
            broken.update(batch.broken)
            if batch.broken and not allow_broken:
                reason = next(iter(batch.broken.values()))
                raise BrokenImageError(f"{reason}; replace the file, or add --allow-missing to leave it out")
            if batch.positions:
                features.append((batch.positions, _forward(tower, batch.inputs, env, options)))
                lost_tokens[batch.positions] = batch.lost_tokens
    except Exception as caught:  # whatever it is, the other ranks must hear of it before they wait for this one
        error = caught
    raise_together(error, env)

    broken = merge_over_ranks(broken, env)
    if broken and env.is_main:
        logger.warning(f"{len(broken):,} {unit}s can't be read and are left out, the first: {broken[min(broken)]}")
    dim = max_over_ranks(max((rows.shape[1] for _, rows in features), default=0), env)
    everything = torch.zeros(num_items, dim)
    for positions, rows in features:
        everything[positions] = rows
    return Encoding(sum_over_ranks(everything, env), broken, sum_over_ranks(lost_tokens, env))


def load_batches(
    dataset: ImageBatches | TextBatches, unit: str, env: DistEnv, options: ComputeOptions
) -> Iterator[Batch]:
    """Yields batches that worker processes load, under a bar that counts items, on rank 0.

    Args:
        dataset: this rank's share.
        unit: what an item is called.
        env: this process.
        options: number of workers.
    """
    loader = Loader(dataset, min(options.workers, len(dataset)), pin=env.device.type == "cuda")
    share = f" (rank 0 of {env.world_size})" if env.world_size > 1 else ""
    with tqdm(
        desc=f"encode {unit}s{share}",
        total=sum(len(batch) for batch in dataset.batches),
        unit=unit,
        delay=2,  # short work is quiet
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
        disable=not env.is_main,
    ) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch.positions) + len(batch.broken))


@torch.no_grad()
def _forward(tower: Callable, inputs: torch.Tensor, env: DistEnv, options: ComputeOptions) -> torch.Tensor:
    """Runs a tower; returns L2-normalised features [n, dim], float32 on the CPU."""
    dtype = get_input_dtype(options.precision) if inputs.is_floating_point() else None
    with get_autocast(options.precision, device_type=env.device.type)():
        features = tower(inputs.to(env.device, dtype, non_blocking=True))
    # Normalised in fp32 even where the tower runs in 16 bits: that rounding would cost R@1.
    features = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    if not features.isfinite().all():
        remedy = "try --precision fp32"
        if options.precision == "fp32":
            remedy = "no flag mends that: the weights are broken, or their training diverged"
        raise FloatingPointError(f"the model returned NaN or infinity in {options.precision}; {remedy}")
    return features
