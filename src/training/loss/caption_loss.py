"""Losses between an image and several text features: [CLS] of the short caption, [CLS] and corners of the long ones.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

With several processes, each rank passes its own part of the batch. All features are gathered in one call; the features
of a locked image tower can be gathered earlier, while the text tower is computing. Memory grows with the features, not
with the square of the batch size: see `blockwise`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from training.loss.blockwise import ContrastRule, contrast
from training.loss.terms import NORMALISATIONS, LossTerm

# torch 2.14 renamed these functions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """Gathers all ranks' rows in one tensor; backward sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, world_size: int) -> torch.Tensor:
        ctx.world_size = world_size
        gathered = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if dist.get_backend() == "nccl":
            own = gradient.new_empty(len(gradient) // ctx.world_size, *gradient.shape[1:])
            _reduce_scatter(own, gradient.contiguous())
            return own, None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # older releases of gloo have no reduce-scatter
        return gradient.chunk(ctx.world_size)[dist.get_rank()], None


def gather_rows(rows: torch.Tensor, world_size: int) -> torch.Tensor:
    """Concatenates all ranks' rows in rank order; gradients flow back to each rank.

    Args:
        rows: [batch, ...], with the same batch on every rank.
        world_size: number of ranks; 1 returns `rows` unchanged.

    Returns:
        [world_size x batch, ...].
    """
    return rows if world_size == 1 else _Gather.apply(rows, world_size)


class EarlyGather:
    """Gathers all ranks' rows, without a gradient, in the background.

    Args:
        rows: [batch, ...], with the same batch on every rank.
        world_size: number of ranks.
    """

    def __init__(self, rows: torch.Tensor, world_size: int):
        self.rows = rows.detach().contiguous()  # kept alive until it has been sent
        self.gathered = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        self.work = _all_gather(self.gathered, self.rows, async_op=True)

    def wait(self) -> torch.Tensor:
        """Returns all ranks' rows in rank order, [world_size x batch, ...]; may be called repeatedly."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.gathered


class _CaptionLoss(nn.Module):
    """Base of both losses: splits features into views and texts, gathers them, and computes the terms.

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

    Raises:
        ValueError: label smoothing with a sigmoid loss, an unknown normalisation, or two terms with the same name.
    """

    kind: str

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
    ):
        super().__init__()
        if label_smoothing and self.kind == "sigmoid":
            raise ValueError("label smoothing is defined for the softmax loss only")
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation {normalisation}: expected one of {', '.join(NORMALISATIONS)}")
        self.terms = tuple(terms or ())
        self.default_terms = (
            LossTerm("short_caption_loss", (0,), short_weight),
            LossTerm("long_caption_loss", None, long_weight),
        )
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms {', '.join(names)}: expected unique names")
        self.rank, self.world_size, self.block_numbers = rank, world_size, block_numbers
        self.label_smoothing, self.normalisation = label_smoothing, normalisation

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
        early: EarlyGather | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Computes the loss between images and captions.

        Args:
            image_features: [batch, dim], or [batch, num_views, dim]; L2-normalised.
            text_features: [batch, T, dim] with the short caption's feature first, or [batch, dim] for one caption;
                L2-normalised.
            logit_scale: already exponentiated.
            logit_bias: added to the logits (SigLIP).
            output_dict: return the terms instead of their sum.
            early: result of `gather_early` for these `image_features`.

        Returns:
            The sum of the terms, or the terms by name. Without `terms`, a single caption [batch, dim] gives one
            unweighted term, ``contrastive_loss``.
            With several views, a term of text 0 alone uses the first view; other terms average over all views.
        """
        images = image_features if image_features.ndim == 3 else image_features[:, None]
        texts = text_features if text_features.ndim == 3 else text_features[:, None]
        default = self.default_terms if text_features.ndim == 3 else (LossTerm("contrastive_loss", (0,)),)
        terms = self.terms or default
        num_texts = texts.shape[1]
        images, texts, compared = self._forms(images, texts, terms)
        pairs = tuple((k, view, text) for k, pairs in enumerate(compared) for view, text in pairs)
        sums = self._contrast(images, texts, logit_scale, logit_bias, early, pairs)
        results = {}
        for term, own, value in zip(terms, compared, sums):
            num_own = len({text for _, text in own}) if self.normalisation == "per-term" else num_texts
            results[term.name] = term.weight * value / (max(num_own, 1) * max(len({view for view, _ in own}), 1))
        return results if output_dict else sum(results.values())

    @staticmethod
    def _forms(images, texts, terms) -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[int, int]]]]:
        """Appends the terms' forms to images and texts; returns both, and the (view, text) pairs of each term."""
        all_images, all_texts, compared = list(images.unbind(1)), list(texts.unbind(1)), []
        used: set[int] = set()
        num_views = len(all_images)
        for term in terms:
            columns = term.columns(texts.shape[1])
            views = range(1 if columns == [0] else num_views)
            if term.image_form is not None:
                all_images.append(term.image_form(all_images[0]))
                views = [len(all_images) - 1]
            if term.text_form is not None:
                forms = [term.text_form(all_texts[text]) for text in columns]
            else:  # a text that an earlier term uses is copied, because `contrast` keeps one gradient per text
                forms = [all_texts[text] for text in columns if text in used]
            if forms:
                kept = [] if term.text_form is not None else [text for text in columns if text not in used]
                columns = [*kept, *range(len(all_texts), len(all_texts) + len(forms))]
                all_texts += forms
            used |= set(columns)
            compared.append([(view, text) for view in views for text in columns])
        if len(all_images) > num_views:
            images = torch.stack(all_images, dim=1)
        if len(all_texts) > texts.shape[1]:
            texts = torch.stack(all_texts, dim=1)
        return images, texts, compared

    def gather_early(self, image_features: torch.Tensor) -> EarlyGather | None:
        """Starts to gather a locked tower's features [batch, dim]; `forward` waits for the result.

        Returns:
            What `forward` takes as `early`; None on one process, or if a term has an image form.
        """
        if self.world_size == 1 or any(term.image_form is not None for term in self.terms):
            return None
        return EarlyGather(image_features, self.world_size)

    def _contrast(self, images, texts, logit_scale, logit_bias, early, pairs) -> torch.Tensor:
        """The terms [K], not weighted."""
        rule = ContrastRule(self.kind, 0, self.block_numbers, self.label_smoothing, pairs)
        if self.world_size == 1:
            return contrast(images, texts, None, None, logit_scale, logit_bias, rule)
        if early is not None:
            all_texts = gather_rows(texts, self.world_size)
            all_images = early.wait()[:, None]
        else:
            both = gather_rows(torch.cat([images, texts], dim=1), self.world_size)
            all_images, all_texts = both.split([images.shape[1], texts.shape[1]], dim=1)
            if not images.requires_grad:  # concatenating them with the texts made them require a gradient
                all_images = all_images.detach()
        rule = replace(rule, first=self.rank * len(images))
        return contrast(images, texts, all_images, all_texts, logit_scale, logit_bias, rule)


class LongCaptionLoss(_CaptionLoss):
    """LoTLIP's loss: symmetric cross-entropy between the image and each text feature.

    Let CE2(t) be the cross-entropy over the global batch from images to text feature t, plus the cross-entropy from
    text feature t to images. With T text features, the short term is short_weight x CE2(0) / 2T, and the long term is
    long_weight x the sum over t >= 1 of CE2(t) / 2T.

    Args: see `_CaptionLoss`.

    Source: LoTLIP (arXiv 2410.05249), section 3.
    """

    kind = "softmax"


class LongCaptionSigLipLoss(_CaptionLoss):
    """`LongCaptionLoss` with SigLIP's pairwise sigmoid (arXiv 2303.15343) instead of cross-entropy; not published.

    Args: see `_CaptionLoss`.
    """

    kind = "sigmoid"
