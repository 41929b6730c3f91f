"""Contrastive terms over pairs of feature sets in blocks of rows: no logits matrix is ever whole, none is kept.

The gradients are made in the forward pass, while a block's logits are at hand: the backward pass only weighs them.
So what stays between the two is as large as the features, and a batch that fits one block costs no matrix product more
than the plain loss. A larger one costs one more per pair of sets, as its column sums are known only after a first pass.

Arithmetic for a global batch of 65,536 in fp32 on one process, T = 10 text features of D = 768: texts 2.01 GB and
images 0.20 GB, their gradients 2.01 + 2 x 0.20 GB, the images' once weighed 0.20 GB, three blocks of 2^24 numbers
0.20 GB: 5.0 GB. The two softmaxes of ten matrices of logits, which the plain loss keeps, would be 344 GB.

Source: the idea is that of Inf-CL (arXiv 2410.17243) and of fused cross-entropies. PyPI's `memeff` (0.3.1) was looked
at and does not fit: CUDA kernels only, a temperature that is a constant, no double precision. GradCache (arXiv
2101.06983) and DisCo-CLIP (arXiv 2304.08480) spare activations of the towers and the other ranks' rows, not the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

SHORT, LONG = 0, 1
BLOCK_NUMBERS_CPU, BLOCK_NUMBERS_GPU = 2**21, 2**24


class _Blocks:
    """Rows of one feature set against all of another, some rows at a time, in the same two buffers.

    Args:
        block_numbers: logits in a block.
        scale: [], what similarities are multiplied by.
        bias: [], what is then added; or None.
    """

    def __init__(self, block_numbers: int, scale: torch.Tensor, bias: torch.Tensor | None):
        self.block_numbers, self.scale, self.bias = block_numbers, scale, bias
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, num_rows: int, num_keys: int) -> list[slice]:
        """As few blocks as the size allows, all of about the same height."""
        height = max(1, self.block_numbers // num_keys)
        height = -(-num_rows // -(-num_rows // height))
        return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]

    def buffer(self, number: int, num_rows: int, num_keys: int) -> torch.Tensor:
        """Scratch [num_rows, num_keys], its content undefined."""
        name = (number, num_keys)
        if name not in self.buffers or len(self.buffers[name]) < num_rows:
            self.buffers[name] = self.scale.new_empty(num_rows, num_keys)
        return self.buffers[name][:num_rows]

    def logits(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[n, dim], [N, dim] -> [n, N], good until the next call."""
        logits = torch.mm(rows * self.scale, keys.T, out=self.buffer(0, len(rows), len(keys)))
        return logits if self.bias is None else logits.add_(self.bias)


def _add_gradients(
    weights: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    d_rows: torch.Tensor | None,
    d_keys: torch.Tensor | None,
    factor: float,
) -> None:
    """Adds factor x weights [n, N] times the other side's features; the logit scale is left out until the end."""
    if d_rows is not None:
        d_rows.addmm_(weights, keys, alpha=factor)
    if d_keys is not None:
        d_keys.addmm_(weights.T, rows, alpha=factor)


def _part(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _two_way(blocks: _Blocks, rows, keys, d_rows, d_keys, wants_grad: bool) -> torch.Tensor:
    """Symmetric cross-entropy of rows and keys, both [N, dim], pairs on the diagonal; gradients are added."""
    num = len(rows)
    parts = blocks.of(num, num)
    row_lse, positive = rows.new_empty(num), rows.new_empty(num)
    key_lse = rows.new_full((num,), -torch.inf)
    for part in parts:
        logits = blocks.logits(rows[part], keys)
        row_lse[part] = logits.logsumexp(1)
        torch.logaddexp(key_lse, logits.logsumexp(0), out=key_lse)
        positive[part] = logits.diagonal(part.start)
    if wants_grad:
        for part in parts:
            if len(parts) > 1:  # a single block's logits are still there
                logits = blocks.logits(rows[part], keys)
            weights = torch.sub(logits, row_lse[part, None], out=blocks.buffer(1, *logits.shape)).exp_()
            weights += logits.sub_(key_lse).exp_()
            weights.diagonal(part.start).sub_(2)
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 0.5 / num)
    return (row_lse + key_lse - 2 * positive).mean() / 2


def _one_way(blocks: _Blocks, rows, keys, first: int, d_rows, d_keys, wants_grad: bool) -> torch.Tensor:
    """Half the cross-entropy from rows [n, dim] to keys [N, dim]; row i belongs to key first + i."""
    num = len(rows)
    losses = rows.new_empty(num)
    for part in blocks.of(num, len(keys)):
        logits = blocks.logits(rows[part], keys)
        lse = logits.logsumexp(1)
        losses[part] = lse - logits.diagonal(first + part.start)
        if wants_grad:
            weights = logits.sub_(lse[:, None]).exp_()
            weights.diagonal(first + part.start).sub_(1)
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 0.5 / num)
    return losses.mean() / 2


def _sigmoid(
    blocks: _Blocks, rows, keys, first: int, d_rows, d_keys, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's loss of rows [n, dim] and keys [N, dim], and its derivative by the bias."""
    num = len(rows)
    total, d_bias = rows.new_zeros(()), rows.new_zeros(())
    for part in blocks.of(num, len(keys)):
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
        first: which of everybody's rows is the first of one's own.
        block_numbers: logits that are held at a time; None takes the device's default.
    """

    kind: str = "softmax"
    first: int = 0
    block_numbers: int | None = None


def contrast(
    images: torch.Tensor,
    texts: torch.Tensor,
    all_images: torch.Tensor | None,
    all_texts: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rule: ContrastRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares each view of the images with each text.

    Args:
        images: [n, V, dim].
        texts: [n, T, dim].
        all_images, all_texts: everybody's, [N, V, dim] and [N, T, dim], where `images` and `texts` are one's own; None
            where these are everybody's themselves.
        scale: one number, positive.
        bias: one number, or None.
        rule: kind of loss, one's place among all.

    Returns:
        The loss of view 0 with text 0, and the sum over all views and texts 1.. of theirs. Computed in fp32 for
        features of 16 bits. Differentiable once.
    """
    terms = _Contrast.apply(images, texts, all_images, all_texts, scale, bias, rule, torch.is_grad_enabled())
    return terms[SHORT], terms[LONG]


def _pairs(num_views: int, num_texts: int) -> Iterator[tuple[int, int, int]]:
    """(term, view, text) of each comparison."""
    yield SHORT, 0, 0
    for view in range(num_views):
        for text in range(1, num_texts):
            yield LONG, view, text


class _Contrast(torch.autograd.Function):
    """Terms [2] of `contrast`, with gradients made on the way."""

    @staticmethod
    def forward(ctx, images, texts, all_images, all_texts, scale, bias, rule: ContrastRule, wants_grad: bool):
        sets = [images, texts, all_images, all_texts]
        ctx.dtypes = [None if x is None else x.dtype for x in (*sets, scale, bias)]
        ctx.shapes = scale.shape, None if bias is None else bias.shape
        dtype = torch.promote_types(texts.dtype, torch.float32)
        sets = [None if x is None else x.to(dtype) for x in sets]
        size = rule.block_numbers or (BLOCK_NUMBERS_GPU if texts.is_cuda else BLOCK_NUMBERS_CPU)
        one = scale.to(dtype).reshape(())
        blocks = _Blocks(size, one, None if bias is None or rule.kind == "softmax" else bias.to(dtype).reshape(()))
        grads: list[torch.Tensor | None] = [None] * 4
        if wants_grad and any(ctx.needs_input_grad):
            for number, (features, needed) in enumerate(zip(sets, ctx.needs_input_grad)):
                if features is not None and number % 2:
                    grads[number] = torch.zeros_like(features)
                elif features is not None and needed:
                    grads[number] = features.new_zeros(2, *features.shape)  # by term: both use view 0
        terms, d_bias = _all_terms(blocks, sets, grads, rule)
        if grads[1] is not None:
            d_scale = sum(_slopes(x, g) for x, g in zip(sets[1::2], grads[1::2]) if g is not None)
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
                weights = grad[(torch.arange(features.shape[1], device=grad.device) > 0).long()][:, None]
                results.append(features * weights if _graph_is_kept() else features.mul_(weights))
            else:
                results.append(torch.einsum("k,knvd->nvd", grad, features))
        results.append((grad @ d_scale).reshape(ctx.shapes[0]))
        results.append(None if ctx.shapes[1] is None else (grad @ d_bias).reshape(ctx.shapes[1]))
        return *(None if r is None else r.to(dtype) for r, dtype in zip(results, ctx.dtypes)), None, None


def _graph_is_kept() -> bool:
    """Whether the running backward pass may be followed by another one; where torch doesn't say, it may."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _all_terms(blocks: _Blocks, sets: list, grads: list, rule: ContrastRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms [2] and their derivatives by the bias [2]; gradients by the features are added to `grads`."""
    images, texts, all_images, all_texts = sets
    is_local, wants_grad = all_texts is not None, grads[1] is not None
    terms, d_bias = texts.new_zeros(2), texts.new_zeros(2)
    for term, view, text in _pairs(images.shape[1], texts.shape[1]):
        image, d_image = images[:, view], _slot(grads[0], term, view)
        own, d_own = texts[:, text], _slot(grads[1], None, text)
        keys, d_keys = (all_texts[:, text], _slot(grads[3], None, text)) if is_local else (own, d_own)
        if rule.kind == "sigmoid":
            loss, slope = _sigmoid(blocks, image, keys, rule.first, d_image, d_keys, wants_grad)
            d_bias[term] += slope
        elif is_local:
            everyone, d_everyone = all_images[:, view], _slot(grads[2], term, view)
            loss = _one_way(blocks, image, keys, rule.first, d_image, d_keys, wants_grad)
            loss = loss + _one_way(blocks, own, everyone, rule.first, d_own, d_everyone, wants_grad)
        else:
            loss = _two_way(blocks, image, own, d_image, d_own, wants_grad)
        terms[term] += loss
    return terms, d_bias


def _slot(grad: torch.Tensor | None, term: int | None, slot: int) -> torch.Tensor | None:
    """The part [n, dim] of a gradient that belongs to a view (of images: of a term) or a text."""
    if grad is None:
        return None
    return grad[:, slot] if term is None else grad[term, :, slot]


def _slopes(texts: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Derivatives [2] of the terms by the scale, from texts [n, T, dim] and their gradients without it."""
    slots = torch.stack([(texts[:, t] * grad[:, t]).sum() for t in range(texts.shape[1])])
    return torch.stack([slots[0], slots[1:].sum()])
