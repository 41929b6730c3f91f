"""Comparisons of rows with keys, in blocks of rows: no logits matrix is kept between forward and backward pass.

Each block runs under `torch.utils.checkpoint`: autograd keeps its inputs, and computes its logits once more in the
backward pass. Memory between the passes is therefore proportional to the features, for one more matrix product per pair
of feature sets. Only the logits of a small batch, which is a single block of at most `BLOCK_NUMBERS_CPU` numbers, are
kept. A new loss is a function of one block's logits, see `in_blocks`; autograd does the rest.

Measured on a CPU: 1.1 GB beside the features for a batch of 16,384 with 10 text features of 768 (from 1 and 2 text
features, in which it is linear); the plain loss keeps two softmaxes of each of the ten logits matrices, 21.5 GB. On one
process, each block also leaves its sums over rows, [blocks, K, N].

Source: the idea follows Inf-CL (arXiv 2410.17243) and fused cross-entropy kernels. PyPI's `memeff` (0.3.1) does not
fit: it has CUDA kernels only, treats the temperature as a constant, and has no double precision. GradCache (arXiv
2101.06983) and DisCo-CLIP (arXiv 2304.08480) save memory for the towers' activations and for other ranks' rows, but not
for the logits matrix.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BLOCK_NUMBERS_CPU, BLOCK_NUMBERS_GPU = 2**21, 2**24


def block_size(features: torch.Tensor, block_numbers: int | None) -> int:
    """Returns the maximum number of logits in a block; None uses the default of the features' device."""
    return block_numbers or (BLOCK_NUMBERS_GPU if features.is_cuda else BLOCK_NUMBERS_CPU)


def in_blocks(
    compare: Callable[..., object],
    rows: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    *others: object,
    block_numbers: int | None = None,
) -> list:
    """Compares blocks of rows with all keys.

    Args:
        compare: ``compare(rows, keys, *others)`` returns the results of a block of rows. It is called again in the
            backward pass, so it must not draw random numbers.
        rows: tensors [n, ...], which are split alike: features, targets, and what else `compare` needs for each row.
        keys: tensors [N, ...], passed whole to every call.
        others: further arguments.
        block_numbers: maximum number of logits of a block, see `block_size`.

    Returns:
        The result of each block, in order.
    """
    num_rows, per_row = len(rows[0]), sum(len(key) for key in keys)
    height = max(1, block_size(rows[0], block_numbers) // per_row)
    height = -(-num_rows // -(-num_rows // height))  # as few blocks as possible, all of about the same height
    blocks = list(zip(*(tensor.split(height) for tensor in rows)))
    if len(blocks) == 1 and num_rows * per_row <= BLOCK_NUMBERS_CPU:  # small enough to be kept
        return [compare(blocks[0], keys, *others)]
    return [
        checkpoint(compare, block, keys, *others, use_reentrant=False, preserve_rng_state=False) for block in blocks
    ]


def similarities(rows: torch.Tensor, keys: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Logits [n, K, N] of rows [n, dim] and K sets of keys [N, dim]."""
    joined = keys[0] if len(keys) == 1 else torch.cat(list(keys))
    return ((rows * scale) @ joined.T).unflatten(1, (len(keys), -1))


def _targets_mean(
    rows: torch.Tensor, keys: Sequence[torch.Tensor], targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Mean over rows of the similarity that the target distribution expects, [K]; needs no logits."""
    matched = torch.stack([(rows * key[targets]).sum() / len(rows) for key in keys])
    if not smoothing:
        return matched
    return (1 - smoothing) * matched + smoothing * torch.stack([rows.mean(0) @ key.mean(0) for key in keys])


def cross_entropy(
    rows: torch.Tensor,
    keys: Sequence[torch.Tensor],
    targets: torch.Tensor,
    scale: torch.Tensor,
    *,
    smoothing: float = 0.0,
    two_way: bool = False,
    block_numbers: int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy from rows to each set of keys.

    Args:
        rows: [n, dim].
        keys: K sets [N, dim]; N may exceed the number of rows, as with other ranks' rows or hard negatives.
        targets: index of each row's matching key, [n] int64.
        scale: a scalar, factor of the similarities.
        smoothing: fraction of the target that is spread evenly over all keys.
        two_way: the mean of both directions, from rows to keys and from keys to rows; needs n = N.
        block_numbers: see `block_size`.

    Returns:
        [K].
    """
    compare = partial(_cross_entropies, smoothing=smoothing, two_way=two_way)
    blocks = in_blocks(compare, (rows, targets), keys, scale, block_numbers=block_numbers)
    of_rows, of_keys = zip(*blocks)
    loss = torch.cat(of_rows).mean(0)
    if not two_way:
        return loss
    backward = torch.stack(of_keys).logsumexp(0).mean(1) - scale * _targets_mean(rows, keys, targets, smoothing)
    return (loss + backward) / 2


def _cross_entropies(rows, keys, scale: torch.Tensor, smoothing: float, two_way: bool) -> tuple:
    """Of a block: cross-entropies of the rows [n, K], and, if both ways are compared, log-sum-exp over rows [K, N]."""
    features, targets = rows
    logits = similarities(features, keys, scale)
    wanted = targets.repeat_interleave(len(keys))
    losses = functional.cross_entropy(logits.flatten(0, 1), wanted, label_smoothing=smoothing, reduction="none")
    return losses.unflatten(0, logits.shape[:2]), logits.logsumexp(0) if two_way else None


def sigmoid_loss(
    rows: torch.Tensor,
    keys: Sequence[torch.Tensor],
    targets: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    block_numbers: int | None = None,
) -> torch.Tensor:
    """SigLIP's loss of rows with each set of keys, [K]: the sum over all pairs, divided by the number of rows.

    Args: see `cross_entropy`; `bias` is a scalar, added to the scaled similarities.

    Source: SigLIP (arXiv 2303.15343).
    """
    blocks = in_blocks(_sigmoid_sums, (rows,), keys, scale, bias, block_numbers=block_numbers)
    # A matching pair's loss is softplus(-z) = softplus(z) - z.
    return torch.stack(blocks).sum(0) / len(rows) - scale * _targets_mean(rows, keys, targets) - bias


def _sigmoid_sums(rows, keys, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.softplus(similarities(rows[0], keys, scale) + bias).sum((0, 2))
