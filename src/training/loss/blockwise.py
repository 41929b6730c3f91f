"""Contrastive terms over pairs of feature sets, in blocks of rows: a full logits matrix is never built or stored.

Gradients are computed in the forward pass, while a block's logits are available; the backward pass only scales them.
Memory between the two passes is therefore proportional to the features. A batch that fits in one block needs no more
matrix products than the plain loss. A larger batch needs one more per pair of feature sets, because the column sums are
known only after a first pass.

Memory for a global batch of 65,536 in fp32 on one process, with T = 10 text features of D = 768: texts 2.01 GB, images
0.20 GB, their gradients per term 2.01 + 2 x 0.20 GB, and the weighted gradients 2.01 + 0.20 GB: 6.8 GB in total. The
plain loss keeps two softmaxes of each of the ten logits matrices, which would take 344 GB.

Source: the idea follows Inf-CL (arXiv 2410.17243) and fused cross-entropy kernels. PyPI's `memeff` (0.3.1) does not
fit: it has CUDA kernels only, treats the temperature as a constant, and has no double precision. GradCache (arXiv
2101.06983) and DisCo-CLIP (arXiv 2304.08480) save memory for the towers' activations and for other ranks' rows, but not
for the logits matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

SHORT, LONG = 0, 1
BLOCK_NUMBERS_CPU, BLOCK_NUMBERS_GPU = 2**21, 2**24


class _Blocks:
    """Compares rows of one feature set with all rows of another, block by block, reusing the same two buffers.

    Args:
        block_numbers: maximum number of logits in a block.
        scale: [], factor of the similarities.
        bias: [], added to the scaled similarities; or None.
        smoothing: label smoothing: the fraction of the target that is spread evenly over all rows.
    """

    def __init__(self, block_numbers: int, scale: torch.Tensor, bias: torch.Tensor | None, smoothing: float = 0.0):
        self.block_numbers, self.scale, self.bias = block_numbers, scale, bias
        self.smoothing = smoothing
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def split(self, num_rows: int, num_keys: int) -> list[slice]:
        """Splits the rows into as few blocks as the block size allows, all of about the same height."""
        height = max(1, self.block_numbers // num_keys)
        height = -(-num_rows // -(-num_rows // height))
        return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]

    def buffer(self, number: int, num_rows: int, num_keys: int) -> torch.Tensor:
        """Returns scratch memory [num_rows, num_keys] with undefined content."""
        name = (number, num_keys)
        if name not in self.buffers or len(self.buffers[name]) < num_rows:
            self.buffers[name] = self.scale.new_empty(num_rows, num_keys)
        return self.buffers[name][:num_rows]

    def logits(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits [n, N] of rows [n, dim] and keys [N, dim]; overwritten by the next call."""
        logits = torch.mm(rows * self.scale, keys.T, out=self.buffer(0, len(rows), len(keys)))
        return logits if self.bias is None else logits.add_(self.bias)

    def target(self, positive: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Expected logit under the target distribution, [n]: the matching pair's, mixed with the mean if smoothed.

        The mean is taken over all of `rows` and `keys`, not per row, so only the mean of the result is exact.
        """
        if not self.smoothing:
            return positive
        everything = self.scale * (rows.mean(0) @ keys.mean(0))
        return (1 - self.smoothing) * positive + self.smoothing * everything

    def subtract_target(self, weights: torch.Tensor, first: int, count: int) -> None:
        """Subtracts `count` times the target distribution from a block of softmax weights [n, N]."""
        weights.diagonal(first).sub_(count * (1 - self.smoothing))
        if self.smoothing:
            weights.sub_(count * self.smoothing / weights.shape[1])


def _add_gradients(
    weights: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    d_rows: torch.Tensor | None,
    d_keys: torch.Tensor | None,
    factor: float,
) -> None:
    """Adds factor x weights [n, N] @ the other side's features; the logit scale is applied once, at the end."""
    if d_rows is not None:
        d_rows.addmm_(weights, keys, alpha=factor)
    if d_keys is not None:
        d_keys.addmm_(weights.T, rows, alpha=factor)


def _part(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _two_way(blocks: _Blocks, rows, keys, d_rows, d_keys, wants_grad: bool) -> torch.Tensor:
    """Symmetric cross-entropy of rows and keys, both [N, dim], with matching pairs on the diagonal.

    Adds the gradients to `d_rows` and `d_keys`.
    """
    num = len(rows)
    parts = blocks.split(num, num)
    row_lse, positive = rows.new_empty(num), rows.new_empty(num)
    key_lse = rows.new_full((num,), -torch.inf)
    for part in parts:
        logits = blocks.logits(rows[part], keys)
        row_lse[part] = logits.logsumexp(1)
        torch.logaddexp(key_lse, logits.logsumexp(0), out=key_lse)
        positive[part] = logits.diagonal(part.start)
    if wants_grad:
        for part in parts:
            if len(parts) > 1:  # with a single block, the logits are still in the buffer
                logits = blocks.logits(rows[part], keys)
            weights = torch.sub(logits, row_lse[part, None], out=blocks.buffer(1, *logits.shape)).exp_()
            weights += logits.sub_(key_lse).exp_()
            blocks.subtract_target(weights, part.start, 2)
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 0.5 / num)
    return (row_lse + key_lse - 2 * blocks.target(positive, rows, keys)).mean() / 2


def _one_way(blocks: _Blocks, rows, keys, first: int, d_rows, d_keys, wants_grad: bool) -> torch.Tensor:
    """Half the cross-entropy from rows [n, dim] to keys [N, dim]; row i matches key first + i."""
    num = len(rows)
    losses = rows.new_empty(num)
    for part in blocks.split(num, len(keys)):
        logits = blocks.logits(rows[part], keys)
        lse = logits.logsumexp(1)
        losses[part] = lse - blocks.target(logits.diagonal(first + part.start), rows[part], keys)
        if wants_grad:
            weights = logits.sub_(lse[:, None]).exp_()
            blocks.subtract_target(weights, first + part.start, 1)
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 0.5 / num)
    return losses.mean() / 2


def _sigmoid(
    blocks: _Blocks, rows, keys, first: int, d_rows, d_keys, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's loss of rows [n, dim] against keys [N, dim], and its derivative with respect to the bias."""
    num = len(rows)
    total, d_bias = rows.new_zeros(()), rows.new_zeros(())
    for part in blocks.split(num, len(keys)):
        logits = blocks.logits(rows[part], keys)
        logits.diagonal(first + part.start).neg_()
        total += softplus(logits).sum()
        if wants_grad:
            weights = logits.sigmoid_()
            weights.diagonal(first + part.start).neg_()
            d_bias += weights.sum() / num
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 1 / num)
    return total / num, d_bias


@dataclass(frozen=True)
class ContrastRule:
    """How feature sets are compared.

    Attributes:
        kind: ``softmax`` or ``sigmoid``.
        first: offset of this rank's rows in the gathered batch.
        block_numbers: maximum number of logits in memory; None uses the device's default.
        label_smoothing: fraction of the target that is spread evenly over all rows (softmax only).
        pairs: comparisons as (term, image view, text), in the order of computation. No two terms may share a text.
            None compares view 0 with text 0 (term 0), and all views with all other texts (term 1).
    """

    kind: str = "softmax"
    first: int = 0
    block_numbers: int | None = None
    label_smoothing: float = 0.0
    pairs: tuple[tuple[int, int, int], ...] | None = None


def contrast(
    images: torch.Tensor,
    texts: torch.Tensor,
    all_images: torch.Tensor | None,
    all_texts: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rule: ContrastRule,
) -> torch.Tensor:
    """Computes contrastive losses between image views and texts.

    Args:
        images: this rank's image features, [n, V, dim].
        texts: this rank's text features, [n, T, dim].
        all_images, all_texts: the features gathered from all ranks, [N, V, dim] and [N, T, dim]; None on one process.
        scale: one positive number.
        bias: one number, or None.
        rule: kind of loss, comparisons, and this rank's offset in the gathered batch.

    Returns:
        Terms [K]: for each term the sum of the losses of its comparisons, not normalised. 16-bit features are compared
        in fp32. Differentiable once.
    """
    if rule.pairs is None:
        rule = replace(rule, pairs=tuple(_default_pairs(images.shape[1], texts.shape[1])))
    return _Contrast.apply(images, texts, all_images, all_texts, scale, bias, rule, torch.is_grad_enabled())


def _default_pairs(num_views: int, num_texts: int) -> Iterator[tuple[int, int, int]]:
    yield SHORT, 0, 0
    for view in range(num_views):
        for text in range(1, num_texts):
            yield LONG, view, text


def _terms_of_texts(rule: ContrastRule, num_texts: int, device: torch.device) -> torch.Tensor:
    """Returns the term that each text belongs to, [T]; 0 for a text that is not compared."""
    terms = dict.fromkeys(range(num_texts), 0) | {text: term for term, _, text in rule.pairs}
    return torch.tensor([terms[text] for text in range(num_texts)], device=device)


def _num_terms(rule: ContrastRule) -> int:
    return max(2, 1 + max(term for term, _, _ in rule.pairs))


class _Contrast(torch.autograd.Function):
    """Computes the terms [K] of `contrast` and, in the same forward pass, their gradients."""

    @staticmethod
    def forward(ctx, images, texts, all_images, all_texts, scale, bias, rule: ContrastRule, wants_grad: bool):
        sets = [images, texts, all_images, all_texts]
        ctx.dtypes = [None if x is None else x.dtype for x in (*sets, scale, bias)]
        ctx.shapes = scale.shape, None if bias is None else bias.shape
        dtype = torch.promote_types(texts.dtype, torch.float32)
        sets = [None if x is None else x.to(dtype) for x in sets]
        size = rule.block_numbers or (BLOCK_NUMBERS_GPU if texts.is_cuda else BLOCK_NUMBERS_CPU)
        one = scale.to(dtype).reshape(())
        own_bias = None if bias is None or rule.kind == "softmax" else bias.to(dtype).reshape(())
        blocks = _Blocks(size, one, own_bias, rule.label_smoothing)
        ctx.terms_of_texts = _terms_of_texts(rule, texts.shape[1], texts.device)
        grads: list[torch.Tensor | None] = [None] * 4
        if wants_grad and any(ctx.needs_input_grad):
            for number, (features, needed) in enumerate(zip(sets, ctx.needs_input_grad)):
                if features is not None and number % 2:
                    grads[number] = torch.zeros_like(features)
                elif features is not None and needed:
                    # One gradient per term, because terms share views.
                    grads[number] = features.new_zeros(_num_terms(rule), *features.shape)
        terms, d_bias = _all_terms(blocks, sets, grads, rule)
        if grads[1] is not None:
            members = [ctx.terms_of_texts == term for term in range(_num_terms(rule))]
            d_scale = sum(_scale_gradients(x, g, members) for x, g in zip(sets[1::2], grads[1::2]) if g is not None)
            for grad in grads:
                if grad is not None:
                    grad.mul_(one)
            ctx.save_for_backward(*grads, d_scale, d_bias)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        *grads, d_scale, d_bias = ctx.saved_tensors
        results: list[torch.Tensor | None] = []
        for number, (features, needed) in enumerate(zip(grads, ctx.needs_input_grad)):
            if features is None or not needed:
                results.append(None)
            elif number % 2:
                results.append(features * grad[ctx.terms_of_texts][:, None])
            else:
                results.append(torch.einsum("k,knvd->nvd", grad, features))
        results.append((grad @ d_scale).reshape(ctx.shapes[0]))
        results.append(None if ctx.shapes[1] is None else (grad @ d_bias).reshape(ctx.shapes[1]))
        return *(None if r is None else r.to(dtype) for r, dtype in zip(results, ctx.dtypes)), None, None


def _all_terms(blocks: _Blocks, sets: list, grads: list, rule: ContrastRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the terms [K] and their derivatives with respect to the bias [K]; adds feature gradients to `grads`."""
    images, texts, all_images, all_texts = sets
    is_local, wants_grad = all_texts is not None, grads[1] is not None
    terms, d_bias = texts.new_zeros(_num_terms(rule)), texts.new_zeros(_num_terms(rule))
    for term, view, text in rule.pairs:
        image, d_image = images[:, view], _slot(grads[0], term, view)
        own, d_own = texts[:, text], _slot(grads[1], None, text)
        keys, d_keys = (all_texts[:, text], _slot(grads[3], None, text)) if is_local else (own, d_own)
        if rule.kind == "sigmoid":
            loss, slope = _sigmoid(blocks, image, keys, rule.first, d_image, d_keys, wants_grad)
            d_bias[term] += slope
        elif is_local:
            gathered, d_gathered = all_images[:, view], _slot(grads[2], term, view)
            loss = _one_way(blocks, image, keys, rule.first, d_image, d_keys, wants_grad)
            loss = loss + _one_way(blocks, own, gathered, rule.first, d_own, d_gathered, wants_grad)
        else:
            loss = _two_way(blocks, image, own, d_image, d_own, wants_grad)
        terms[term] += loss
    return terms, d_bias


def _slot(grad: torch.Tensor | None, term: int | None, slot: int) -> torch.Tensor | None:
    """Returns the slice [n, dim] of a gradient for one text, or for one image view and term."""
    if grad is None:
        return None
    return grad[:, slot] if term is None else grad[term, :, slot]


def _scale_gradients(texts: torch.Tensor, grad: torch.Tensor, members: list[torch.Tensor]) -> torch.Tensor:
    """Returns the derivatives [K] of the terms with respect to the scale.

    Args:
        texts: [n, T, dim].
        grad: gradients of `texts`, not yet multiplied by the scale.
        members: for each term, which texts belong to it, [T] bool.
    """
    by_text = torch.stack([(texts[:, t] * grad[:, t]).sum() for t in range(texts.shape[1])])
    return torch.stack([by_text[chosen].sum() for chosen in members])
