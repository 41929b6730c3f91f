"""Losses between an image and several text features: [CLS] of the short caption, [CLS] and corners of the long ones.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

With several processes, each rank passes its own part of the batch, and all features are gathered in one call. Memory
grows with the features, not with the square of the batch size: see `blockwise`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from training.loss.blockwise import block_size, cross_entropy, sigmoid_loss
from training.runtime.registry import Registry, expect_one_of

NORMALISATIONS = ("published", "per-term")


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss.

    Attributes:
        name: key in the loss's output and in the log; ends in ``_loss``.
        texts: indices into a sample's T text features; None means all but the first.
        weight: factor of the term in the sum.
        image_form, text_form: functions from this process's features [batch, dim] to the features [batch, dim] that the
            term compares, such as `reduce_features`; None compares the features as they are.
    """

    name: str
    texts: Sequence[int] | None = None
    weight: float = 1.0
    image_form: Callable[[torch.Tensor], torch.Tensor] | None = None
    text_form: Callable[[torch.Tensor], torch.Tensor] | None = None

    def columns(self, num_texts: int) -> list[int]:
        """Returns the indices of this term's text features, of T = `num_texts`."""
        return list(range(1, num_texts) if self.texts is None else self.texts)


def reduce_features(
    features: torch.Tensor, components: int | None = None, variance: float | None = None
) -> torch.Tensor:
    """Projects features [n, dim] onto principal components of the batch.

    Long-CLIP reduces image features for short captions, HiMo-CLIP text features. The features are centred and
    projected, and their mean is added back; the result is not normalised. Gradients flow through the projection, too.

    Args:
        features: features of this process's batch, [n, dim].
        components: number of components; with min(n - 1, dim) or more, the features are returned unchanged.
        variance: instead of `components`: use the fewest components that explain this fraction of the variance.

    Source: Long-CLIP (arXiv 2403.15378), HiMo-CLIP (arXiv 2511.06653).
    """
    if components is not None and components >= min(len(features) - 1, features.shape[1]):
        return features  # the components explain all of the variance
    mean = features.mean(0)
    centred = features - mean
    return _Projector.apply(centred @ centred.T, components, variance) @ centred + mean


class _Projector(torch.autograd.Function):
    """Projector [n, n] onto the eigenvectors with the largest eigenvalues of a symmetric matrix.

    Differentiating through the decomposition would divide by the differences between all eigenvalues, and some
    eigenvalues of a centred batch nearly coincide. The projector's gradient needs only the differences between the
    chosen eigenvalues and the rest. Which ones are chosen stays on the device.
    """

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, components: int | None, variance: float | None) -> torch.Tensor:
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))  # descending
        if components is not None:
            chosen = torch.arange(len(values), device=values.device) < components
        else:  # as long as the larger eigenvalues explain too little
            chosen = values.cumsum(0) - values < variance * values.sum()
        ctx.save_for_backward(values, vectors, chosen)
        return (vectors * chosen) @ vectors.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values, vectors, chosen = ctx.saved_tensors
        gap = torch.where(~chosen[:, None] & chosen, values - values[:, None], torch.inf)  # [rest, chosen]
        half = vectors @ (vectors.T @ (grad + grad.T) @ vectors / gap / 2) @ vectors.T
        return half + half.T, None, None


# torch 2.14 renamed these functions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """Gathers all ranks' rows in one tensor; backward sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, world_size: int, dtype: torch.dtype | None) -> torch.Tensor:
        ctx.world_size = world_size
        sent = rows.to(dtype or rows.dtype).contiguous()
        gathered = sent.new_empty(world_size * len(rows), *rows.shape[1:])
        _all_gather(gathered, sent)
        return gathered.to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if dist.get_backend() != "gloo":
            summed = gradient.new_empty(len(gradient) // ctx.world_size, *gradient.shape[1:])
            _reduce_scatter(summed, gradient.contiguous())
            return summed, None, None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # older releases of gloo have no reduce-scatter
        return gradient.chunk(ctx.world_size)[dist.get_rank()], None, None


def gather_rows(rows: torch.Tensor, world_size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Concatenates all ranks' rows in rank order; gradients flow back to each rank.

    Args:
        rows: [batch, ...], with the same batch on every rank.
        world_size: number of ranks; 1 returns `rows` unchanged.
        dtype: dtype in which the rows travel; None: their own. Gradients always travel in the rows' dtype, because sums
            over hundreds of ranks would lose too much in 16 bits.

    Returns:
        [world_size x batch, ...].
    """
    return rows if world_size == 1 else _Gather.apply(rows, world_size, dtype)


class LongCaptionLoss(nn.Module):
    """LoTLIP's loss: symmetric cross-entropy between the image and each text feature.

    Let CE2(t) be the cross-entropy over the global batch from images to text feature t, plus the cross-entropy from
    text feature t to images. With T text features, the short term is short_weight x CE2(0) / 2T, and the long term is
    long_weight x the sum over t >= 1 of CE2(t) / 2T.

    Each rank compares its own rows with all ranks' rows, and gradients flow through the gather: the gradients averaged
    by DDP equal those of one process on the whole batch.

    Args:
        short_weight: weight of text feature 0, the short caption's (published as `--clip_lossweight`).
        long_weight: weight of all other text features (published as `--declip_lossweight`).
        local_loss, gather_with_grad: no effect; accepted because open_clip's `ClipLoss` has them.
        rank, world_size: this process's rank, and the number of processes that share a batch.
        block_numbers: maximum number of logits in memory; None uses the device's default. Affects rounding only.
        terms: replaces the two terms defined by the weights.
        label_smoothing: fraction of the target that is spread evenly over all rows of the batch.
        normalisation: ``published``: a term is the sum of its texts' losses divided by the number of all text features;
            ``per-term``: divided by the number of its own texts, so adding texts to one term does not weaken another.
        gather_dtype: dtype in which features travel between ranks; None: that of the features. Each rank compares its
            own rows, which are not rounded, with all ranks' rows, which are.

    Raises:
        ValueError: an unknown normalisation, or two terms with the same name.

    Source: LoTLIP (arXiv 2410.05249), section 3.
    """

    def __init__(
        self,
        short_weight: float = 1.0,
        long_weight: float = 1.0,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        rank: int = 0,
        world_size: int = 1,
        block_numbers: int | None = None,
        *,
        terms: Sequence[LossTerm] | None = None,
        label_smoothing: float = 0.0,
        normalisation: str = "published",
        gather_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        expect_one_of(NORMALISATIONS, normalisation, "normalisation")
        default = LossTerm("short_caption_loss", (0,), short_weight), LossTerm("long_caption_loss", None, long_weight)
        self.terms, self.default_terms = Registry[LossTerm]("loss term"), default
        for term in terms or ():
            self.terms.register(term.name)(term)
        self.rank, self.world_size, self.block_numbers = rank, world_size, block_numbers
        self.label_smoothing, self.normalisation, self.gather_dtype = label_smoothing, normalisation, gather_dtype

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Computes the loss between images and captions.

        Args:
            image_features: [batch, dim], or [batch, num_views, dim]; L2-normalised.
            text_features: [batch, T, dim] with the short caption's feature first, or [batch, dim] for one caption;
                L2-normalised.
            logit_scale: already exponentiated.
            logit_bias: added to the logits (SigLIP).
            output_dict: return the terms instead of their sum.

        Returns:
            The sum of the terms, or the terms by name. Without `terms`, a single caption [batch, dim] gives one
            unweighted term, ``contrastive_loss``.
            With several views, a term of text 0 alone uses the first view; other terms average over all views.
        """
        dtype = torch.promote_types(text_features.dtype, torch.float32)
        images, texts = (
            list((x if x.ndim == 3 else x[:, None]).to(dtype).unbind(1)) for x in (image_features, text_features)
        )
        num_views, num_texts = len(images), len(texts)
        default = self.default_terms if text_features.ndim == 3 else (LossTerm("contrastive_loss", (0,)),)
        compared = []
        for term in self.terms.values() or default:
            columns = term.columns(num_texts)
            views = [0] if columns == [0] else list(range(num_views))
            if term.image_form is not None:
                views = [len(images)]
                images.append(term.image_form(images[0]))
            if term.text_form is not None:
                texts += [term.text_form(texts[column]) for column in columns]
                columns = list(range(len(texts) - len(columns), len(texts)))
            compared.append((term, views, columns))
        all_images, all_texts = self._gather(images, texts)
        # As many texts at a time as fit in a block, because many small operations are slow.
        count = max(1, block_size(texts[0], self.block_numbers) // (len(images[0]) * len(all_texts[0])))
        results = {}
        for term, views, columns in compared:
            value = texts[0].new_zeros(())
            for view, start in itertools.product(views, range(0, len(columns), count)):
                mine, everyones = ([side[c] for c in columns[start : start + count]] for side in (texts, all_texts))
                value = value + self.compare(images[view], mine, all_images[view], everyones, logit_scale, logit_bias)
            divisor = max(len(columns), 1) if self.normalisation == "per-term" else num_texts
            results[term.name] = term.weight * value / (divisor * len(views))
        return results if output_dict else sum(results.values(), texts[0].new_zeros(()))

    def _targets(self, rows: torch.Tensor) -> torch.Tensor:
        """Indices of this rank's rows among the gathered ones."""
        return torch.arange(len(rows), device=rows.device) + self.rank * len(rows)

    def _gather(self, images: list, texts: list) -> tuple[Sequence, Sequence]:
        """Returns all ranks' images and texts, exchanged in one call."""
        if self.world_size == 1:
            return images, texts
        gathered = gather_rows(torch.stack([*images, *texts], dim=1), self.world_size, self.gather_dtype).unbind(1)
        # Stacking images without a gradient with the texts made them require one.
        all_images = [x if mine.requires_grad else x.detach() for mine, x in zip(images, gathered)]
        return all_images, gathered[len(images) :]

    def compare(self, images, texts, all_images, all_texts, scale, bias) -> torch.Tensor:
        """Compares this rank's rows with those of all ranks.

        Args:
            images: [n, dim].
            texts: K texts, [n, dim] each.
            all_images, all_texts: the same of all ranks, [N, dim] each.
            scale, bias: one number each; bias may be None.

        Returns:
            The sum of the texts' losses.
        """
        options: dict[str, Any] = {"smoothing": self.label_smoothing, "block_numbers": self.block_numbers}
        targets = self._targets(images)
        if self.world_size == 1:
            return cross_entropy(images, texts, targets, scale, two_way=True, **options).sum()
        of_images = cross_entropy(images, all_texts, targets, scale, **options)
        rows, targets = torch.cat(texts), targets.repeat(len(texts))
        of_texts = cross_entropy(rows, [all_images], targets, scale, **options) * len(texts)
        return (of_images.sum() + of_texts.sum()) / 2


class LongCaptionSigLipLoss(LongCaptionLoss):
    """`LongCaptionLoss` with SigLIP's pairwise sigmoid (arXiv 2303.15343) instead of cross-entropy; not published.

    Args: see `LongCaptionLoss`.

    Raises:
        ValueError: label smoothing, which a sigmoid loss does not have.
    """

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if label_smoothing:
            raise ValueError("label smoothing is defined for the softmax loss only")

    def compare(self, images, texts, all_images, all_texts, scale, bias) -> torch.Tensor:
        """See `LongCaptionLoss.compare`."""
        bias = torch.zeros_like(scale) if bias is None else bias
        options = {"block_numbers": self.block_numbers}
        return sigmoid_loss(images, all_texts, self._targets(images), scale, bias, **options).sum()
