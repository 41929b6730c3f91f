"""Arranges the captions of a batch in buckets by length, so that little padding is computed.

This happens on the CPU, where batches are built, so that no training step has to read lengths back from the device.
The text tower returns features in the original order of the captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

# Fixed cost of a bucket, expressed in tokens: kernel launches, and gradients that are added up; where all buckets are
# computed together on a CPU, of its attention only. Estimates, not measured.
BUCKET_COST_CPU, BUCKET_COST_TOGETHER, BUCKET_COST_GPU = 32, 4, 1024


class Captions(NamedTuple):
    """A batch's captions, arranged for the text tower.

    Attributes:
        buckets: token ids of each bucket, [n_b, L_b], padded.
        index: index of each caption among the captions of all buckets in order, [n] int64.
        num_padded: number of tokens to compute, padding included.
    """

    buckets: tuple[torch.Tensor, ...]
    index: torch.Tensor
    num_padded: int

    def to(self, device: torch.device, non_blocking: bool = True) -> "Captions":
        """Returns a copy on a device."""
        buckets = tuple(ids.to(device, non_blocking=non_blocking) for ids in self.buckets)
        return Captions(buckets, self.index.to(device, non_blocking=non_blocking), self.num_padded)


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
    """Arranges the short and long captions of a batch in buckets.

    Attributes:
        pad_id: id of padding.
        bucket_cost: fixed cost of a bucket, in tokens.
        multiple: bucket widths are rounded up to a multiple of this, so that few different shapes occur.
    """

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
        lengths = torch.cat([caption_lengths(ids, self.pad_id) for ids in groups]).clamp(min=1)
        longest = max(ids.shape[1] for ids in groups)
        ids = torch.cat([nn.functional.pad(ids, (0, longest - ids.shape[1]), value=self.pad_id) for ids in groups])
        widths = (-(-lengths // self.multiple) * self.multiple).clamp(max=longest)
        widths, order = widths.sort(stable=True)
        bounds = bucket_bounds(widths.tolist(), self.bucket_cost)
        buckets = tuple(
            ids[order[start:end], : int(widths[end - 1])].contiguous() for start, end in zip([0, *bounds], bounds)
        )
        return Captions(buckets, order.argsort(), sum(bucket.numel() for bucket in buckets))
