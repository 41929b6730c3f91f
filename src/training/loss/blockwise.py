"""Contrastive terms over pairs of feature sets in blocks of rows: no logits matrix is ever whole, none is kept.

The gradients are made in the forward pass, while a block's logits are at hand: the backward pass only weighs them.
So what stays between the two is as large as the features, and a batch that fits one block costs no matrix product more
than the plain loss. A larger one costs one more per pair of sets, as its column sums are known only after a first pass.

Arithmetic for a global batch of 65,536 in fp32 on one process, T = 10 text features of D = 768: texts 2.01 GB and
images 0.20 GB, their gradients by term 2.01 + 2 x 0.20 GB, and these once weighted 2.01 + 0.20 GB: 6.8 GB. The two
softmaxes of ten matrices of logits, which the plain loss keeps, would be 344 GB.

Source: the idea is that of Inf-CL (arXiv 2410.17243) and of fused cross-entropies. PyPI's `memeff` (0.3.1) was looked
at and does not fit: CUDA kernels only, a temperature that is a constant, no double precision. GradCache (arXiv
2101.06983) and DisCo-CLIP (arXiv 2304.08480) spare activations of the towers and the other ranks' rows, not the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
        smoothing: share of the target that goes to all rows alike.
    """

    def __init__(self, block_numbers: int, scale: torch.Tensor, bias: torch.Tensor | None, smoothing: float = 0.0):
        self.block_numbers, self.scale, self.bias = block_numbers, scale, bias
        self.smoothing = smoothing
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

    def target(self, positive: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mean logit of the targets: of the pairs themselves, and with smoothing also of all pairs."""
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
            blocks.subtract_target(weights, part.start, 2)
            _add_gradients(weights, rows[part], keys, _part(d_rows, part), d_keys, 0.5 / num)
    return (row_lse + key_lse - 2 * blocks.target(positive, rows, keys)).mean() / 2


def _one_way(blocks: _Blocks, rows, keys, first: int, d_rows, d_keys, wants_grad: bool) -> torch.Tensor:
    """Half the cross-entropy from rows [n, dim] to keys [N, dim]; row i belongs to key first + i."""
    num = len(rows)
    losses = rows.new_empty(num)
    for part in blocks.of(num, len(keys)):
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
        first: offset of this rank's rows in the gathered batch.
        block_numbers: logits that are held at a time; None takes the device's default.
        label_smoothing: share of the target that goes to all rows alike (softmax only).
        pairs: comparisons as (term, view of the images, text), in the order of computation; the texts of different
            terms are different ones. None compares view 0 with text 0 (term 0), and all views with all others (term 1).
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
    """Compares views of the images with texts.

    Args:
        images: [n, V, dim].
        texts: [n, T, dim].
        all_images, all_texts: all ranks' rows, [N, V, dim] and [N, T, dim], where `images` and `texts` are this rank's;
            None where these are all there are.
        scale: one number, positive.
        bias: one number, or None.
        rule: kind of loss, comparisons, this rank's place among all.

    Returns:
        Terms [K]: the sum of the losses of each term's comparisons, not normalised. Computed in fp32 for features of
        16 bits. Differentiable once.
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
    """The term that each text belongs to [T]; 0 for a text that is not compared."""
    terms = dict.fromkeys(range(num_texts), 0) | {text: term for term, _, text in rule.pairs}
    return torch.tensor([terms[text] for text in range(num_texts)], device=device)


def _num_terms(rule: ContrastRule) -> int:
    return max(2, 1 + max(term for term, _, _ in rule.pairs))


class _Contrast(torch.autograd.Function):
    """Terms [K] of `contrast`, with gradients made on the way."""

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
                    grads[number] = features.new_zeros(_num_terms(rule), *features.shape)  # terms share views
        terms, d_bias = _all_terms(blocks, sets, grads, rule)
        if grads[1] is not None:
            of_terms = [ctx.terms_of_texts == term for term in range(_num_terms(rule))]
            d_scale = sum(_slopes(x, g, of_terms) for x, g in zip(sets[1::2], grads[1::2]) if g is not None)
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
    """Terms [K] and their derivatives by the bias [K]; gradients by the features are added to `grads`."""
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


def _slopes(texts: torch.Tensor, grad: torch.Tensor, of_terms: list[torch.Tensor]) -> torch.Tensor:
    """Derivatives [K] of the terms by the scale, from texts [n, T, dim] and their gradients without it."""
    slots = torch.stack([(texts[:, t] * grad[:, t]).sum() for t in range(texts.shape[1])])
    return torch.stack([slots[chosen].sum() for chosen in of_terms])
