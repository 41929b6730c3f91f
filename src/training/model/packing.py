"""Captions of a batch arranged so that little padding is computed: in buckets by length, or all in one row.

Done where batches are made, on the CPU, so that no step has to ask the device for lengths. The text tower takes the
result and gives features in the order of the captions, whatever the arrangement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

MODES = ("padded", "buckets", "flex")
ROW_BLOCK = 128  # tokens in a block of a row's attention mask
# What one more bucket costs beside its tokens, in tokens: launching the layers' kernels. Estimates, not measured.
BUCKET_COST_CPU, BUCKET_COST_GPU = 32, 1024


class Row(NamedTuple):
    """All captions one after another; the rest of the row is padding.

    Attributes:
        ids: [1, budget] int64.
        positions: [1, budget] int64, place of each token in its caption; 0 in the padding.
        captions: [budget] int64, number of the caption; every token of padding has a number of its own.
        starts: [n] int64, where each caption's first token is.
        lengths: [n] int64, tokens of each caption.
        first_blocks, last_blocks: [budget / ROW_BLOCK] int64; blocks that a block's captions reach to.
        longest: tokens of the longest caption, or more.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    captions: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    first_blocks: torch.Tensor
    last_blocks: torch.Tensor
    longest: int


class Captions(NamedTuple):
    """A batch's captions as the text tower computes them.

    Attributes:
        buckets: token ids [n_b, L_b] each, padded; none if there is a row.
        places: [n] int64, where among the captions of all buckets each caption is.
        row: or all in one row.
        num_slots: tokens computed, padding included.
    """

    buckets: tuple[torch.Tensor, ...]
    places: torch.Tensor
    row: Row | None
    num_slots: int

    def to(self, device: torch.device, non_blocking: bool = True) -> "Captions":
        """The same on a device."""

        def move(value: object) -> object:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        row = None if self.row is None else Row(*map(move, self.row))
        return Captions(tuple(map(move, self.buckets)), move(self.places), row, self.num_slots)


def caption_lengths(ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Number of tokens of each caption up to its last one [n], of ids [n, seq_len] padded behind.

    Not the number of tokens that are no padding: padding's id may occur within a caption (CLIP's is an exclamation
    mark, and BERT's tokenizer takes ``[PAD]`` in a text literally), and padding may stand in front of a text.
    """
    return ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(dim=1)


def bucket_bounds(lengths: Sequence[int], cost: int) -> list[int]:
    """Divides captions into buckets so that all tokens, and `cost` more for each bucket, are as few as can be.

    Args:
        lengths: of captions, ascending.
        cost: of a bucket, in tokens.

    Returns:
        Where each bucket ends in `lengths`, ascending; a bucket is as wide as its last caption.
    """
    ends = [i + 1 for i in range(len(lengths)) if i + 1 == len(lengths) or lengths[i + 1] != lengths[i]]
    best, before = {0: 0}, {}
    for end in ends:
        width = lengths[end - 1]
        best[end], before[end] = min((total + (end - start) * width + cost, start) for start, total in best.items())
    bounds, end = [], len(lengths)
    while end:
        bounds.append(end)
        end = before[end]
    return bounds[::-1]


@dataclass(frozen=True)
class CaptionArranger:
    """Arranges the short and long captions of a batch.

    Attributes:
        mode: ``buckets`` or ``flex``.
        pad_id: of padding in token ids.
        bucket_cost: as of `bucket_bounds`.
        multiple: widths of buckets are rounded up to it, to keep the number of different shapes small.
    """

    mode: str
    pad_id: int
    bucket_cost: int = BUCKET_COST_CPU
    multiple: int = 1

    def __call__(self, *groups: torch.Tensor) -> Captions:
        """Arranges captions.

        Args:
            groups: token ids [n, L] or [n, K, L] on the CPU, [CLS] first and padding last.

        Returns:
            All captions, those of a group after those of the one before.
        """
        groups = [ids.flatten(0, -2) for ids in groups if ids.shape[-2]]
        if self.mode == "flex":
            return self._row(groups)
        return self._buckets(groups)

    def _buckets(self, groups: list[torch.Tensor]) -> Captions:
        lengths = torch.cat([caption_lengths(ids, self.pad_id) for ids in groups]).clamp(min=1)
        longest = max(ids.shape[1] for ids in groups)
        ids = torch.full((len(lengths), longest), self.pad_id)
        for part, rows in zip(ids.split([len(rows) for rows in groups]), groups):
            part[:, : rows.shape[1]] = rows
        widths = (-(-lengths // self.multiple) * self.multiple).clamp(max=longest)
        widths, order = widths.sort(stable=True)
        bounds = bucket_bounds(widths.tolist(), self.bucket_cost)
        buckets = tuple(
            ids[order[start:end], : int(widths[end - 1])].contiguous() for start, end in zip([0, *bounds], bounds)
        )
        return Captions(buckets, order.argsort(), None, sum(bucket.numel() for bucket in buckets))

    def _row(self, groups: list[torch.Tensor]) -> Captions:
        # Padding's id within a caption is left out, as nobody attends to it; the tokens keep their positions.
        lengths = torch.cat([(ids != self.pad_id).sum(dim=1) for ids in groups])
        total, longest = int(lengths.sum()), max(ids.shape[1] for ids in groups)
        budget = token_budget(total, sum(ids.numel() for ids in groups))
        starts = lengths.cumsum(0) - lengths
        ids = torch.full((budget,), self.pad_id)
        ids[:total] = torch.cat([rows[rows != self.pad_id] for rows in groups])
        index = torch.arange(budget)
        captions = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        captions = torch.cat([captions, len(lengths) + index[total:]])
        positions = torch.zeros(budget, dtype=torch.int64)
        positions[:total] = torch.cat([(rows != self.pad_id).nonzero()[:, 1] for rows in groups])
        blocks = index.unflatten(0, (-1, ROW_BLOCK))
        first = torch.cat([starts[captions[:total]], index[total:]])
        last = torch.cat([(starts + lengths - 1)[captions[:total]], index[total:]])
        first_blocks, last_blocks = first[blocks[:, 0]] // ROW_BLOCK, last[blocks[:, -1]] // ROW_BLOCK
        row = Row(ids[None], positions[None], captions, starts, lengths, first_blocks, last_blocks, longest)
        return Captions((), torch.arange(len(lengths)), row, budget)


def token_budget(total: int, num_slots: int) -> int:
    """Tokens of a row: `total` rounded up by at most a 64th of what padding would take, so that few sizes occur."""
    step = max(1, num_slots // 64 // ROW_BLOCK) * ROW_BLOCK
    return -(-total // step) * step
