"""What the loader passes to the model: a dict of the model's inputs, together with sample keys and position.

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

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import NamedTuple

import torch

FIELD = "field."  # begins the names of inputs that are for the loss alone, see `Experiment.sample_fields`


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

    inputs: dict[str, object]
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
    for batch in chain(batches, [None]):
        arriving = None
        if batch is not None:
            with torch.cuda.stream(copying):
                arriving = batch, batch.inputs_on(device), copying.record_event()
        if waiting is not None:
            batch_before, inputs, copied = waiting
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in _tensors(inputs):
                tensor.record_stream(computing)
            yield batch_before, inputs
        waiting = arriving


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields all tensors in nested dicts and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
