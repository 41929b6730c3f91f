"""Losses between images and several captions each: the short one's [CLS], the long ones' [CLS] and corners.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

Under several processes every rank passes its own part of the batch; all features travel in one gather, or those of a
locked image tower before, while the text tower computes. Memory grows with the features, not with the square of the
batch: see `blockwise`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from training.loss.blockwise import ContrastRule, contrast
from training.loss.terms import NORMALISATIONS, LossTerm, reduce_features

# torch 2.14 has given them new names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """All ranks' rows in one tensor; each rank's gradient is the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, world_size: int) -> torch.Tensor:
        ctx.world_size = world_size
        everyone = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        _all_gather(everyone, rows.contiguous())
        return everyone

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
    """Joins all ranks' rows, in rank order: [batch, ..] -> [world_size x batch, ..]; gradients flow back to each rank.

    Args:
        rows: as many on every rank.
        world_size: 1 returns `rows` themselves.
    """
    return rows if world_size == 1 else _Gather.apply(rows, world_size)


class EarlyGather:
    """All ranks' rows, without a gradient, on their way while this rank computes something else.

    Args:
        rows: as many on every rank.
        world_size: of all that gather.
    """

    def __init__(self, rows: torch.Tensor, world_size: int):
        self.rows = rows.detach().contiguous()  # held until it has been sent
        self.everyone = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        self.work = _all_gather(self.everyone, self.rows, async_op=True)

    def wait(self) -> torch.Tensor:
        """Returns all ranks' rows, in rank order; may be called again."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.everyone


class _CaptionLoss(nn.Module):
    """What both losses share: views and captions as sets of features, the gather, the terms.

    Each rank compares its own rows with all ranks' rows, and gradients flow through the gather: gradients that DDP
    averages equal those of one process on the whole batch.

    Args:
        short_weight: weight of text feature 0, the short caption's (published as `--clip_lossweight`).
        long_weight: weight of all other text features (published as `--declip_lossweight`).
        local_loss, gather_with_grad: no effect; open_clip's `ClipLoss` takes them, too.
        rank, world_size: this process among those that share a batch.
        block_numbers: logits that are held at a time; None takes the device's default. Sums differ in rounding alone.
        terms: replaces the two terms that the weights define.
        label_smoothing: share of the target that goes to all rows of the batch alike.
        normalisation: ``published``: a term is the sum of its texts' losses over the number of all text features;
            ``per-term``: the mean over its own, so that no term gets lighter as texts are added to another one.

    Raises:
        ValueError: label smoothing of a sigmoid loss, an unknown normalisation, or two terms of one name.
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
            raise ValueError(f"terms {', '.join(names)}: expected different names")
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
        """Compares images and captions.

        Args:
            image_features: [batch, dim], or [batch, num_views, dim]; L2-normalised.
            text_features: [batch, T, dim], feature 0 of the short caption; or [batch, dim], one caption; L2-normalised.
            logit_scale: exponentiated.
            logit_bias: added to the logits (SigLIP).
            output_dict: return the terms instead of their sum.
            early: what `gather_early` gave for these `image_features`.

        Returns:
            Their sum, or the terms by name. Without `terms`, a single caption [batch, dim] has the one term
            ``contrastive_loss``, which is not weighted.
            Of several views a term of text 0 alone takes the first, the others the mean over all.
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
        """Adds reduced forms behind images and texts; returns both, and the (view, text) pairs of each term."""
        all_images, all_texts, compared = list(images.unbind(1)), list(texts.unbind(1)), []
        used: set[int] = set()
        num_views = len(all_images)
        for term in terms:
            columns = term.columns(texts.shape[1])
            views = range(1 if columns == [0] else num_views)
            if term.image_components is not None:
                all_images.append(reduce_features(all_images[0], term.image_components))
                views = [len(all_images) - 1]
            if term.text_variance is not None:
                forms = [reduce_features(all_texts[text], variance=term.text_variance) for text in columns]
            else:  # a text of an earlier term, too, is compared as a copy: `contrast` keeps gradients by text
                forms = [all_texts[text] for text in columns if text in used]
            if forms:
                kept = [] if term.text_variance is not None else [text for text in columns if text not in used]
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
        """Begins to gather a locked tower's features [batch, dim]; `forward` waits for them. None on one process, or
        where a term needs other forms of them, too."""
        if self.world_size == 1 or any(term.image_components is not None for term in self.terms):
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
            if not images.requires_grad:  # a locked tower's got one from the texts they travelled with
                all_images = all_images.detach()
        rule = replace(rule, first=self.rank * len(images))
        return contrast(images, texts, all_images, all_texts, logit_scale, logit_bias, rule)


class LongCaptionLoss(_CaptionLoss):
    """The loss of LoTLIP: symmetric cross-entropy of the image with each text feature.

    With CE2(t) = cross-entropy over the global batch from images to text feature t plus that back, and T text features:
    short term = short_weight x CE2(0) / 2T, long term = long_weight x sum over t >= 1 of CE2(t) / 2T.

    Args: see `_CaptionLoss`.

    Source: LoTLIP (arXiv 2410.05249), section 3.
    """

    kind = "softmax"


class LongCaptionSigLipLoss(_CaptionLoss):
    """The same with SigLIP's pairwise sigmoid in place of cross-entropy (arXiv 2303.15343); ours, not published.

    Args: see `_CaptionLoss`.
    """

    kind = "sigmoid"
