"""Arranges the captions of a batch so that little padding is computed: in buckets by length, or all in one row.

This happens on the CPU, where batches are built, so that no training step has to read lengths back from the device.
The text tower returns features in the original order of the captions, whatever the arrangement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

MODES = ("padded", "buckets", "flex")
ROW_BLOCK = 128  # tokens in a block of a row's attention mask
# Fixed cost of a bucket, expressed in tokens: kernel launches, and gradients that are added up; where all buckets are
# computed together on a CPU, of its attention only. Estimates, not measured.
BUCKET_COST_CPU, BUCKET_COST_TOGETHER, BUCKET_COST_GPU = 32, 4, 1024


class Row(NamedTuple):
    """All captions concatenated in one row, padded at the end.

    Attributes:
        ids: token ids, [1, budget] int64.
        positions: position of each token within its caption, [1, budget] int64; 0 for padding.
        captions: index of each token's caption, [budget] int64; each padding token has a different index, >= n.
        starts: index in the row of each caption's first token, [n] int64.
        lengths: number of tokens of each caption, [n] int64.
        first_blocks, last_blocks: for each block of ROW_BLOCK tokens, the first and last block that its captions
            extend to, [budget / ROW_BLOCK] int64.
        longest: upper bound of the number of tokens of a caption.
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
    """A batch's captions, arranged for the text tower.

    Attributes:
        buckets: token ids of each bucket, [n_b, L_b], padded; empty if the captions are in a row.
        places: index of each caption among the captions of all buckets in order, [n] int64.
        row: all captions in one row; None if they are in buckets.
        num_slots: number of tokens to compute, padding included.
    """

    buckets: tuple[torch.Tensor, ...]
    places: torch.Tensor
    row: Row | None
    num_slots: int

    def to(self, device: torch.device, non_blocking: bool = True) -> "Captions":
        """Returns a copy on a device."""

        def move(value: object) -> object:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        row = None if self.row is None else Row(*map(move, self.row))
        return Captions(tuple(map(move, self.buckets)), move(self.places), row, self.num_slots)


def caption_lengths(ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Returns the length of each caption, up to its last token that is not padding.

    This is not the number of tokens that differ from `pad_id`. That id may also occur within a caption (CLIP's is an
    exclamation mark, and BERT's tokenizer reads ``[PAD]`` in a text as the token), or before it.

    Args:
        ids: [n, seq_len].
        pad_id: id of padding.

    Returns:
        [n] int64.
    """
    return ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(dim=1)


def bucket_bounds(lengths: Sequence[int], cost: int) -> list[int]:
    """Divides captions into buckets so that the total of padded tokens, plus `cost` per bucket, is minimal.

    Args:
        lengths: lengths of the captions, ascending.
        cost: fixed cost of a bucket, in tokens.

    Returns:
        The end of each bucket in `lengths`, ascending; a bucket is as wide as its last caption.
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
        pad_id: id of padding.
        bucket_cost: fixed cost of a bucket, in tokens.
        multiple: bucket widths are rounded up to a multiple of this, so that few different shapes occur.
    """

    mode: str
    pad_id: int
    bucket_cost: int = BUCKET_COST_CPU
    multiple: int = 1

    def __call__(self, *groups: torch.Tensor) -> Captions:
        """Arranges captions.

        Args:
            groups: token ids [n, L] or [n, K, L] on the CPU, with [CLS] first and padding last.

        Returns:
            All captions, in the order of the groups.
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
        # Tokens with padding's id within a caption are dropped: no token attends to them. Others keep their positions.
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
    """Returns the length of a row: `total`, rounded up so that few sizes occur.

    Args:
        total: number of tokens of all captions.
        num_slots: number of tokens with all captions padded; the step of rounding is at most 1/64 of it, or one block.
    """
    step = max(1, num_slots // 64 // ROW_BLOCK) * ROW_BLOCK
    return -(-total // step) * step
