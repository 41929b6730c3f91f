"""Losses between images and several captions each: the short one's [CLS], the long ones' [CLS] and corners.

    loss = LongCaptionLoss(short_weight=1.0, long_weight=1.0)
    terms = loss(image_features, text_features, logit_scale, output_dict=True)
    sum(terms.values()).backward()

Under several processes every rank passes its own part of the batch; all features travel in one gather.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather as all_gather_with_grad
from torch.nn.functional import cross_entropy, logsigmoid


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
        return torch.cat(all_gather_with_grad(rows.contiguous()))
    everyone = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(everyone, rows.detach().contiguous())
    everyone[dist.get_rank()] = rows
    return torch.cat(everyone)


class _CaptionLoss(nn.Module):
    """What both losses share: views and captions as lists, the gather, the weights.

    Args:
        short_weight: of the term of text feature 0, the short caption (published as `--clip_lossweight`).
        long_weight: of the terms of all other text features (`--declip_lossweight`).
        local_loss: each rank compares its own rows with everybody's, instead of everybody's with everybody's: the same
            gradients, less memory. Needs `gather_with_grad`.
        gather_with_grad: gradients equal to one process on the whole batch. Without it they are 1 / world_size of that.
        rank, world_size: this process among those that share a batch.

    Raises:
        ValueError: `local_loss` without `gather_with_grad`, whose gradients would be wrong, not only smaller.
    """

    def __init__(
        self,
        short_weight: float = 1.0,
        long_weight: float = 1.0,
        local_loss: bool = False,
        gather_with_grad: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__()
        if local_loss and not gather_with_grad and world_size > 1:
            raise ValueError("--local-loss needs --gather-with-grad: without it the other ranks' gradients are lost")
        self.short_weight, self.long_weight = short_weight, long_weight
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Compares images and captions.

        Args:
            image_features: [batch, dim], or [batch, num_views, dim]; L2-normalised.
            text_features: [batch, T, dim], feature 0 of the short caption; or [batch, dim], one caption; L2-normalised.
            logit_scale: exponentiated.
            logit_bias: added to the logits (SigLIP).
            output_dict: return the terms instead of their sum.

        Returns:
            Their sum, or ``{"short_caption_loss", "long_caption_loss"}``; of a single caption
            ``{"contrastive_loss"}``, not weighted. Of several views the short term takes the first, the long term the
            mean over all.
        """
        images = image_features if image_features.ndim == 3 else image_features[:, None]
        texts = text_features if text_features.ndim == 3 else text_features[:, None]
        num_views, num_texts = images.shape[1], texts.shape[1]
        own = torch.cat([images, texts], dim=1)
        everyone = gather_rows(own, self.world_size, self.gather_with_grad)
        own = own if self.local_loss else everyone

        def pair(view: int, text: int) -> torch.Tensor:
            v, t = view, num_views + text
            return self._pair_loss(own[:, v], own[:, t], everyone[:, v], everyone[:, t], logit_scale, logit_bias)

        if text_features.ndim == 2:
            terms = {"contrastive_loss": pair(0, 0)}
        else:
            long_terms = [pair(v, t) for v in range(num_views) for t in range(1, num_texts)]
            long_sum = torch.stack(long_terms).sum() if long_terms else own.sum() * 0.0
            terms = {
                "short_caption_loss": self.short_weight * pair(0, 0) / num_texts,
                "long_caption_loss": self.long_weight * long_sum / (num_texts * num_views),
            }
        return terms if output_dict else sum(terms.values())

    def _first_row(self, num_rows: int) -> int:
        return self.rank * num_rows if self.local_loss else 0

    def _pair_loss(self, own_image, own_text, all_image, all_text, logit_scale, logit_bias) -> torch.Tensor:
        """Loss of one image feature against one text feature: own rows [n, dim], everybody's [N, dim]."""
        raise NotImplementedError


class LongCaptionLoss(_CaptionLoss):
    """The loss of LoTLIP: symmetric cross-entropy of the image with each text feature.

    With CE2(t) = cross-entropy over the global batch from images to text feature t plus that back, and T text features:
    short term = short_weight x CE2(0) / 2T, long term = long_weight x sum over t >= 1 of CE2(t) / 2T.

    Args: see `_CaptionLoss`.

    Source: LoTLIP (arXiv 2410.05249), section 3.
    """

    def _pair_loss(self, own_image, own_text, all_image, all_text, logit_scale, logit_bias) -> torch.Tensor:
        first = self._first_row(len(own_image))
        target = torch.arange(first, first + len(own_image), device=own_image.device)
        per_image = logit_scale * own_image @ all_text.T
        # Where the own rows are everybody's, one matrix serves both directions.
        per_text = logit_scale * own_text @ all_image.T if self.local_loss else per_image.T
        return (cross_entropy(per_image, target) + cross_entropy(per_text, target)) / 2


class LongCaptionSigLipLoss(_CaptionLoss):
    """The same with SigLIP's pairwise sigmoid in place of cross-entropy (arXiv 2303.15343); ours, not published.

    Args: see `_CaptionLoss`.
    """

    def _pair_loss(self, own_image, own_text, all_image, all_text, logit_scale, logit_bias) -> torch.Tensor:
        first = self._first_row(len(own_image))
        logits = logit_scale * own_image @ all_text.T
        if logit_bias is not None:
            logits = logits + logit_bias
        sign = torch.full_like(logits, -1.0)
        rows = torch.arange(len(own_image), device=logits.device)
        sign[rows, rows + first] = 1.0
        return -logsigmoid(sign * logits).sum() / len(own_image)
