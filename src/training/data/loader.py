"""From raw samples to batches, in worker processes: the model's inputs, together with sample keys and position.

The keys of `TrainBatch.inputs` are open_clip's, and the arguments of `TrainModel.forward`:

| key | value | present |
|---|---|---|
| ``image`` | [batch, 3, H, W], normalised, or uint8 to be normalised on the device | unless features are cached |
| ``image_features`` | [batch, dim] of a locked image tower | if features are cached |
| ``text`` | [batch, length] int64, short captions, padded to the longest of them | unless captions are packed |
| ``long_text`` | [batch, num_long, length] int64, long captions, padded likewise | with long captions, unless packed |
| ``packed_text`` | all captions as `model.packing` arranges them | if captions are packed |
| ``field.NAME`` | [batch, ...], for the loss | if an experiment adds fields |
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset, get_worker_info

from training.data.order import Share, Span, count_slots, cut
from training.data.reader import Sample, SampleReader, random_state_kept, tokenise
from training.data.shards import Source
from training.readers.faults import BadSample, Totals
from training.readers.samples import RawSample
from training.runtime.workers import Loader


class TrainBatch(NamedTuple):
    """One micro-batch of one process.

    Attributes:
        inputs: name -> argument of the model; see above.
        num_tokens: number of tokens of all captions, without padding.
        num_padded: number of tokens that the text tower computes, padding included.
        keys: shard/key of each sample.
        bad_samples: (kind, shard/key) of each bad sample that was skipped while filling this batch.
        position: (worker, slots of its part of the epoch that it has read up to and including this batch).
    """

    inputs: dict[str, Any]
    num_tokens: int
    num_padded: int
    keys: list[str]
    bad_samples: list[tuple[str, str]]
    position: tuple[int, int]

    def inputs_on(self, device: torch.device) -> dict[str, object]:
        """Returns the inputs on a device; the copy is asynchronous."""
        return {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}


def to_device(batches: Iterator[TrainBatch], device: torch.device) -> Iterator[tuple[TrainBatch, dict[str, object]]]:
    """Yields (batch, its inputs on the device). On a GPU the next batch is copied while the current one is computed."""
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.inputs_on(device)
        return
    copying, waiting = torch.cuda.Stream(device), None
    for upcoming in chain(batches, [None]):
        arriving = None
        if upcoming is not None:
            with torch.cuda.stream(copying):
                arriving = upcoming, upcoming.inputs_on(device), copying.record_event()
        if waiting is not None:
            batch_before, inputs, copied = waiting
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in tree_leaves(inputs):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(computing)
            yield batch_before, inputs
        waiting = arriving


class NoUsableSampleError(RuntimeError):
    """A loader process found no sample that it could train on."""


class TrainBatches(IterableDataset):
    """Batches of one epoch for one process; each worker reads its own spans of the source.

    Args:
        source: the samples.
        reader: turns a raw sample into pixels and texts.
        share: this process's part of the epoch.
        refill: replace bad samples by reading the first samples of the worker's spans again, with other crops and
            captions, so that each process makes its number of full batches. If False, each slot is read once, and the
            last batch may be smaller, or consist only of bad samples.

    Raises:
        NoUsableSampleError: raised while iterating if `refill` is set and no slot of a worker holds a usable sample.
    """

    def __init__(self, source: Source, reader: SampleReader, share: Share, refill: bool = True):
        self.source, self.reader, self.share, self.refill = source, reader, share, refill

    def __iter__(self) -> Iterator[TrainBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader asks its workers in turn, beginning with 0. After resuming, worker 0 therefore has to take the role
        # of the worker whose batch comes next.
        worker = (worker + self.share.batches_done) % num_workers
        spans, num_batches = self.share.of_worker(worker, num_workers)
        slots_done = self.share.slots_done[worker] if self.share.slots_done else 0
        samples = self._usable(spans, slots_done)
        done, together = len(range(worker, self.share.batches_done, num_workers)), self.reader.experiment.group_batches
        for number in range(done - done % together, num_batches, together):
            before = worker + number * num_workers - self.share.batches_done
            self.step = self.reader.step + before // self.reader.accum_freq
            with random_state_kept():
                batches, num_slots = self._make_batches(samples, min(together, num_batches - number))
            # Within a group, a run that resumes reads the whole group again and leaves out what is done.
            positions = [slots_done] * (len(batches) - 1) + [slots_done := slots_done + num_slots]
            for batch, position in list(zip(batches, positions))[max(done - number, 0) :]:
                yield batch._replace(position=(worker, position))

    def _usable(self, spans: list[Span], slots_done: int) -> Iterator[tuple[str, Sample | None, str | None]]:
        """Yields (shard/key, sample, None) or (shard/key, None, kind of bad sample), one for each slot.

        With `refill` it never ends: each process must make its number of batches, or the other processes would wait.
        """
        num_slots, num_good = count_slots(spans), slots_done
        kinds: Counter[str] = Counter()
        if not num_slots:
            return
        first_pass, skip = divmod(slots_done, num_slots)
        for times_read in count(first_pass):
            for raw in chain.from_iterable(map(self._read, cut(spans, skip, num_slots))):
                try:
                    sample = self.reader(raw, times_read, self.step)
                except BadSample as error:
                    kinds[error.kind] += 1
                    yield raw.name, None, error.kind
                    continue
                num_good += 1
                yield raw.name, sample, None
            if not self.refill:
                return
            if not num_good:
                slots = ", ".join(f"{s.start:,} to {s.stop:,}" for s in spans[:3])
                found = Totals(kinds.total(), kinds).describe()
                raise NoUsableSampleError(f"no usable sample in slots {slots} of the epoch: {found}")
            skip = num_good = 0

    def _read(self, span: Span) -> Iterator[RawSample]:
        return islice(self.source.read(self.reader.epoch, *span[:3]), span.last - span.first)

    def _make_batches(self, samples: Iterator, number: int) -> tuple[list[TrainBatch], int]:
        """Returns this many batches, fewer at the end without `refill`, and the number of slots read for them."""
        rows, keys, bad_samples, size = [], [], [], self.share.batch_size
        for name, sample, kind in samples:
            if kind:
                bad_samples.append((kind, name))
                continue
            rows.append(sample)
            keys.append(name)
            if len(rows) == number * size:
                break
        num_slots = len(keys) + len(bad_samples)
        if not rows:
            return [TrainBatch({}, 0, 0, [], bad_samples, (0, 0))] if bad_samples else [], num_slots
        order = list(self.reader.experiment.order_samples(rows, size))
        if sorted(order) != list(range(len(rows))):
            raise ValueError(f"order_samples of the experiment: expected a permutation of range({len(rows)})")
        batches: list[TrainBatch] = []
        for start in range(0, len(order), size):
            chosen = [rows[index] for index in order[start : start + size]]
            inputs = {name: torch.stack([row.inputs[name] for row in chosen]) for name in chosen[0].inputs}
            captions, num_tokens, num_padded = collate_captions(self.reader, chosen)
            names, bad = [keys[index] for index in order[start : start + size]], [] if batches else bad_samples
            batches.append(TrainBatch(inputs | captions, num_tokens, num_padded, names, bad, (0, 0)))
        return batches, num_slots


def collate_captions(reader: SampleReader, rows: list[Sample]) -> tuple[dict[str, Any], int, int]:
    """Tokenises the captions of a batch; short and long ones are padded separately, or packed together.

    Args:
        reader: provides the tokenizer, and the function that packs captions.
        rows: samples with the same number of texts each.

    Returns:
        (dict with ``text`` and ``long_text``, or with ``packed_text``; number of tokens without padding; number of
        tokens with padding).
    """
    short, num_tokens = tokenise(reader.tokenizer, [row.texts[0] for row in rows], [row.fronts[0] for row in rows])
    groups = {"text": short}
    if num_long := len(rows[0].texts) - 1:
        fronts = [front for row in rows for front in row.fronts[1:]]
        long, num_more = tokenise(reader.tokenizer, [text for row in rows for text in row.texts[1:]], fronts)
        groups["long_text"], num_tokens = long.unflatten(0, (len(rows), num_long)), num_tokens + num_more
    if reader.arrange:
        packed = reader.arrange(*groups.values())
        return {"packed_text": packed}, num_tokens, packed.num_padded
    return groups, num_tokens, sum(ids.numel() for ids in groups.values())


def make_loader(
    source: Source, reader: SampleReader, share: Share, num_workers: int, pin: bool, refill: bool = True
) -> Loader:
    """Returns a loader of one epoch's batches; their order doesn't depend on how fast the workers are."""
    return Loader(TrainBatches(source, reader, share, refill), num_workers, pin)
