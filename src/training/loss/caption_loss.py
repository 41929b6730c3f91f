"""Losses between an image and several text features: [CLS] of the short caption, [CLS] and corners of the long ones.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

With several processes, each rank passes its own part of the batch, and all features are gathered in one call. Memory
grows with the features, not with the square of the batch size: see `blockwise`.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from training.loss.blockwise import block_size, cross_entropy, sigmoid_loss
from training.loss.gather import gather_rows
from training.loss.terms import NORMALISATIONS, LossTerm


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
        if normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation {normalisation}: expected one of {', '.join(NORMALISATIONS)}")
        default = LossTerm("short_caption_loss", (0,), short_weight), LossTerm("long_caption_loss", None, long_weight)
        self.terms, self.default_terms = tuple(terms or ()), default
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms {', '.join(names)}: expected unique names")
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
        for term in self.terms or default:
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
        return results if output_dict else sum(results.values())

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
        options = {"smoothing": self.label_smoothing, "block_numbers": self.block_numbers}
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

    def __init__(self, *args: object, label_smoothing: float = 0.0, **kwargs: object):
        super().__init__(*args, **kwargs)
        if label_smoothing:
            raise ValueError("label smoothing is defined for the softmax loss only")

    def compare(self, images, texts, all_images, all_texts, scale, bias) -> torch.Tensor:
        """See `LongCaptionLoss.compare`."""
        bias = torch.zeros_like(scale) if bias is None else bias
        options = {"block_numbers": self.block_numbers}
        return sigmoid_loss(images, all_texts, self._targets(images), scale, bias, **options).sum()
