"""From raw samples to batches: decode, augment, choose captions, tokenise; in the loader's worker processes."""

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dataloaders.images import BrokenImageError, HugeImageError, load_rgb
from training.data.captions import CaptionRule, NoCaptionError, choose_captions
from training.data.faults import BadSample
from training.data.images import PictureReader
from training.data.padding import front_shares, pad_in_front
from training.data.position import Segment, Stretch, count_items, cut
from training.data.shards import Source
from training.data.tar import BrokenShardError, RawSample
from training.runtime.stop import STOP_SIGNALS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class TrainBatch(NamedTuple):
    """One step of one process.

    Attributes:
        images: [batch, 3, H, W], uint8 where the device is to normalise them; or features [batch, dim] in their place.
        short_ids: [batch, length] int64, the short captions, padded to the longest of them.
        long_ids: [batch, num_captions - 1, length] int64, likewise; [batch, 0, 1] where there are none.
        num_tokens: of all captions, without padding.
        keys: shard/key of each sample.
        faults: (kind, shard/key) of each sample that was passed over on the way to this batch.
        position: (worker, slots of its stretch that it has used up with this batch).
        captions: both kinds together, as the reader's `arrange` gives them; None without one.
    """

    images: torch.Tensor
    short_ids: torch.Tensor
    long_ids: torch.Tensor
    num_tokens: int
    keys: list[str]
    faults: list[tuple[str, str]]
    position: tuple[int, int]
    captions: object | None = None

    @property
    def num_slots(self) -> int:
        """Tokens that the text tower computes, padding included."""
        if self.captions is not None:
            return self.captions.num_slots
        return self.short_ids.numel() + (self.long_ids.numel() if self.long_ids.shape[1] else 0)

    def inputs(self, device: torch.device) -> tuple[object, ...]:
        """(images, short_ids, long_ids), or (images, None, None, captions), on a device."""
        images = self.images.to(device, non_blocking=True)
        if self.captions is not None:
            return images, None, None, self.captions.to(device)
        return images, *(ids.to(device, non_blocking=True) for ids in (self.short_ids, self.long_ids))


class NoUsableSampleError(RuntimeError):
    """A loader process found nothing at all that it could train on."""


@dataclass(frozen=True)
class SampleReader:
    """Turns a raw sample into pixels and texts, as a function of seed, epoch and the sample's key.

    Attributes:
        pictures: file -> [3, H, W].
        tokenizer: texts -> ids; all of a batch's short captions at once, then all long ones.
        rule: which captions.
        seed: of augmentation and caption choice.
        epoch: likewise.
        arrange: token ids of short and of long captions -> what the text tower takes; None leaves them padded.
    """

    pictures: PictureReader
    tokenizer: Callable
    rule: CaptionRule
    seed: int
    epoch: int
    arrange: Callable | None = None

    def __call__(self, raw: RawSample) -> tuple[torch.Tensor, list[str]]:
        """Returns (pixels, texts); raises BadSample."""
        seed_augmentation(f"{self.seed}/{self.epoch}/{raw.source}/{raw.key}")
        try:
            texts = choose_captions(read_record(raw), self.rule, random)
        except NoCaptionError as error:
            raise BadSample(str(error)) from error
        if not all(map(_is_unicode, texts)):
            raise BadSample("text not UTF-8")
        if raw.features is not None:
            view = random.randrange(len(raw.features))
            return torch.from_numpy(raw.features[view].astype(np.float32)), texts
        return self.pictures.transform(read_image(raw, self.pictures.decode)), texts


def read_record(raw: RawSample) -> dict:
    """Returns the captions of a sample by key, and whatever else is beside them; raises BadSample."""
    if raw.fault:
        raise BadSample(raw.fault)
    record = dict(raw.record)
    if "json" in raw.files:
        try:
            content = json.loads(raw.files["json"])
        except UnicodeDecodeError as error:
            raise BadSample("text not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadSample("broken JSON") from error
        if not isinstance(content, dict):
            raise BadSample("JSON not an object")
        record |= content
    if "txt" in raw.files:
        try:
            record.setdefault("txt", raw.files["txt"].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadSample("text not UTF-8") from error
    return record


def read_image(raw: RawSample, decode: Callable = load_rgb) -> object:
    """Returns a sample's picture, as `decode` gives it; raises BadSample."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in raw.files), None)
    if suffix is None and raw.image_path is None:
        raise BadSample("no image")
    try:
        return decode(raw.image_path if suffix is None else raw.files[suffix])
    except HugeImageError as error:
        raise BadSample("image too large") from error
    except BrokenImageError as error:
        raise BadSample("broken image") from error


def _is_unicode(text: str) -> bool:
    """JSON may spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def seed_augmentation(name: str) -> None:
    """Seeds every random stream that image transforms draw from."""
    number = int.from_bytes(sha256(name.encode()).digest()[:8], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves the process's random streams as they were: without workers, loading must not disturb dropout."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


class TrainBatches(IterableDataset):
    """Batches of one epoch for one process; a worker reads its own stretch of the source.

    Args:
        source: the samples.
        reader: sample -> pixels and texts.
        stretch: this process's part.

    Raises:
        NoUsableSampleError: while iterating, if a worker's whole stretch holds no usable sample.
    """

    def __init__(self, source: Source, reader: SampleReader, stretch: Stretch):
        self.source, self.reader, self.stretch = source, reader, stretch

    def __iter__(self) -> Iterator[TrainBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader asks its workers in turn, beginning with 0: whoever's batch comes next must be that one.
        worker = (worker + self.stretch.num_done) % num_workers
        segments, num_batches = self.stretch.of_worker(worker, num_workers)
        used = self.stretch.used_slots[worker] if self.stretch.used_slots else 0
        samples = self._usable(segments, used)
        for _ in range(len(range(worker, self.stretch.num_done, num_workers)), num_batches):
            with random_state_kept():
                batch, num_used = self._make_batch(samples)
            used += num_used
            yield batch._replace(position=(worker, used))

    def _usable(self, segments: list[Segment], used: int) -> Iterator[tuple[str, tuple | None, str | None]]:
        """Yields (shard/key, (pixels, texts), None) or (shard/key, None, kind of fault), one for each slot.

        Faults leave gaps, which are filled from the first segment's start again: every process must make its number
        of batches, or the others would wait for it.
        """
        num_slots, num_good = count_items(segments), used
        skip = used % num_slots
        while True:
            for raw in self._raw(cut(segments, skip, num_slots)):
                if isinstance(raw, BrokenShardError):
                    yield str(raw), None, raw.kind
                    continue
                name = f"{raw.source}/{raw.key}"
                try:
                    content = self.reader(raw)
                except BadSample as error:
                    yield name, None, str(error)
                    continue
                num_good += 1
                yield name, content, None
            if not num_good:
                places = ", ".join(f"{s.start:,} to {s.stop:,}" for s in segments[:3])
                raise NoUsableSampleError(f"no usable sample in slots {places} of the epoch")
            skip = num_good = 0

    def _raw(self, segments: list[Segment]) -> Iterator[RawSample | BrokenShardError]:
        for start, stop, first, last in segments:
            yield from islice(self.source.read(self.reader.epoch, start, stop, first), last - first)

    def _make_batch(self, samples: Iterator) -> tuple[TrainBatch, int]:
        pixels, texts, keys, faults = [], [], [], []
        while len(pixels) < self.stretch.batch_size:
            name, content, fault = next(samples)
            if fault:
                faults.append((fault, name))
                continue
            pixels.append(content[0])
            texts.append(content[1])
            keys.append(name)
        fronts = front_shares(f"{self.reader.seed}/{self.reader.epoch}", keys, self.reader.rule)
        short, num_short = tokenise(self.reader.tokenizer, [t[0] for t in texts], [f[0] for f in fronts])
        num_long = len(texts[0]) - 1
        long, num_tokens = torch.zeros(len(texts) * num_long, 1, dtype=torch.int64), 0
        if num_long:
            long_texts, long_fronts = ([text for t in rows for text in t[1:]] for rows in (texts, fronts))
            long, num_tokens = tokenise(self.reader.tokenizer, long_texts, long_fronts)
        long = long.unflatten(0, (len(texts), num_long))
        batch = TrainBatch(torch.stack(pixels), short, long, num_short + num_tokens, keys, faults, (0, 0))
        if self.reader.arrange:
            batch = batch._replace(captions=self.reader.arrange(short, long))
        return batch, len(keys) + len(faults)


def tokenise(tokenizer: Callable, texts: list[str], fronts: Sequence[float] = ()) -> tuple[torch.Tensor, int]:
    """Token ids [n, length] of n texts, without the padding that all have; and the tokens that are not padding.

    Args:
        tokenizer: of the model.
        texts: n.
        fronts: see `pad_in_front`.
    """
    ids = tokenizer(texts)
    return trim_padding(tokenizer, pad_in_front(ids, fronts) if any(fronts) else ids)


def trim_padding(tokenizer: Callable, ids: torch.Tensor, multiple: int = 8) -> tuple[torch.Tensor, int]:
    """Token ids [n, length], cut after the longest text; and the number of tokens that are not padding.

    Args:
        tokenizer: that made them; ours is cut, another one's rows may carry tokens at their end, and stay whole.
        ids: [n, context_length].
        multiple: `length` is one of it, or the context length: this keeps the number of different shapes small.
    """
    hugging_face = getattr(tokenizer, "tokenizer", None)
    pad_id = getattr(tokenizer, "pad_id", getattr(hugging_face, "pad_token_id", 0))
    lengths = (ids != pad_id).sum(dim=1)
    if hasattr(tokenizer, "pad_id"):
        # CLIP's padding is also the id of an exclamation mark: what counts is where the last token is.
        lengths = ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1)).amax(dim=1)
        longest = int(lengths.max())
        ids = ids[:, : min(ids.shape[1], -(-longest // multiple) * multiple)].contiguous()
    return ids, int(lengths.sum())


def to_device(batches: Iterator[TrainBatch], device: torch.device) -> Iterator[tuple[TrainBatch, tuple]]:
    """Yields (batch, its inputs on the device); to a GPU, a batch is copied while the one before is computed with."""
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.inputs(device)
        return
    copying, waiting = torch.cuda.Stream(device), None
    for batch in chain(batches, [None]):
        arriving = None
        if batch is not None:
            with torch.cuda.stream(copying):
                arriving = batch, batch.inputs(device), copying.record_event()
        if waiting is not None:
            batch_before, inputs, copied = waiting
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in _tensors(inputs):
                tensor.record_stream(computing)
            yield batch_before, inputs
        waiting = arriving


def _outlive_signals(_: int) -> None:
    """SLURM signals every process of a job; a worker that ends by it would end training before it has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class _Loader(DataLoader):
    """Workers are born with these signals held back: torch's own handler would end them before they can ignore any."""

    def __iter__(self) -> Iterator[TrainBatch]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in tuples of tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _as_it_is(batch: TrainBatch) -> TrainBatch:
    return batch


def make_loader(source: Source, reader: SampleReader, stretch: Stretch, num_workers: int, pin: bool) -> DataLoader:
    """Returns a loader of one epoch's `TrainBatch`es; their order does not depend on how fast workers are."""
    return _Loader(
        TrainBatches(source, reader, stretch),
        batch_size=None,  # workers make whole batches
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=_outlive_signals,
        # Python 3.14 starts processes from a server, which would not hand on what signals are held back.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
