"""Losses between images and several captions each: the short one's [CLS], the long ones' [CLS] and corners.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

Under several processes every rank passes its own part of the batch; all features travel in one gather, or those of a
locked image tower before, while the text tower computes. Memory grows with the features, not with the square of the
batch: see `contrast`.
"""

import torch
import torch.distributed as dist
from torch import nn

from training.loss.blockwise import ContrastRule, contrast

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


def gather_rows(rows: torch.Tensor, world_size: int, with_grad: bool) -> torch.Tensor:
    """Joins all ranks' rows, in rank order: [batch, ..] -> [world_size x batch, ..].

    Args:
        rows: as many on every rank.
        world_size: 1 returns `rows` themselves.
        with_grad: let gradients flow back to the ranks that the rows came from; otherwise only this rank's own rows, in
            their place among the others, carry a gradient.
    """
    if world_size == 1:
        return rows
    if with_grad:
        return _Gather.apply(rows, world_size)
    everyone = list(_Gather.apply(rows.detach(), world_size).chunk(world_size))
    everyone[dist.get_rank()] = rows
    return torch.cat(everyone)


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
    """What both losses share: views and captions as sets of features, the gather, the weights.

    Args:
        short_weight: of the term of text feature 0, the short caption (published as `--clip_lossweight`).
        long_weight: of the terms of all other text features (`--declip_lossweight`).
        local_loss: each rank compares its own rows with everybody's, instead of everybody's with everybody's: the same
            gradients, less memory. Needs `gather_with_grad`.
        gather_with_grad: gradients equal to one process on the whole batch. Without it they are 1 / world_size of that.
        rank, world_size: this process among those that share a batch.
        block_numbers: logits that are held at a time; None takes the device's default. Sums differ in rounding alone.

    Raises:
        ValueError: `local_loss` without `gather_with_grad`, whose gradients would be wrong, not only smaller.
    """

    kind: str

    def __init__(
        self,
        short_weight: float = 1.0,
        long_weight: float = 1.0,
        local_loss: bool = False,
        gather_with_grad: bool = True,
        rank: int = 0,
        world_size: int = 1,
        block_numbers: int | None = None,
    ):
        super().__init__()
        if local_loss and not gather_with_grad and world_size > 1:
            raise ValueError("--local-loss needs --gather-with-grad: without it the other ranks' gradients are lost")
        self.short_weight, self.long_weight = short_weight, long_weight
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size, self.block_numbers = rank, world_size, block_numbers

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
            Their sum, or ``{"short_caption_loss", "long_caption_loss"}``; of a single caption
            ``{"contrastive_loss"}``, not weighted. Of several views the short term takes the first, the long term the
            mean over all.
        """
        images = image_features if image_features.ndim == 3 else image_features[:, None]
        texts = text_features if text_features.ndim == 3 else text_features[:, None]
        num_views, num_texts = images.shape[1], texts.shape[1]
        short, long = self._terms(images, texts, logit_scale, logit_bias, early)
        if text_features.ndim == 2:
            terms = {"contrastive_loss": short}
        else:
            terms = {
                "short_caption_loss": self.short_weight * short / num_texts,
                "long_caption_loss": self.long_weight * long / (num_texts * num_views),
            }
        return terms if output_dict else sum(terms.values())

    def gather_early(self, image_features: torch.Tensor) -> EarlyGather | None:
        """Begins to gather a locked tower's features [batch, dim]; `forward` waits for them. None on one process."""
        return EarlyGather(image_features, self.world_size) if self.world_size > 1 else None

    def _terms(self, images, texts, logit_scale, logit_bias, early) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of view 0 with text 0, and the sum of all views' with all other texts."""
        if self.world_size == 1:
            return contrast(images, texts, None, None, logit_scale, logit_bias, self._rule(0))
        if early is not None:
            all_texts = gather_rows(texts, self.world_size, self.gather_with_grad)
            all_images = early.wait()[:, None]
        else:
            both = gather_rows(torch.cat([images, texts], dim=1), self.world_size, self.gather_with_grad)
            all_images, all_texts = both.split([images.shape[1], texts.shape[1]], dim=1)
            if not images.requires_grad:  # a locked tower's got one from the texts they travelled with
                all_images = all_images.detach()
        if self.local_loss:
            rule = self._rule(self.rank * len(images))
            return contrast(images, texts, all_images, all_texts, logit_scale, logit_bias, rule)
        return contrast(all_images, all_texts, None, None, logit_scale, logit_bias, self._rule(0))

    def _rule(self, first: int) -> ContrastRule:
        return ContrastRule(self.kind, first, self.block_numbers)


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
