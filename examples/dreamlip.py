"""DreamLIP's grouping loss: each sub-caption is compared with the patches of its image that are most similar to it.

    python -m training.main --config dreamlip --experiment examples/dreamlip.py --grouping-weight 1 --train-data ...

Zheng et al., DreamLIP: Language-Image Pre-training with Long Captions (ECCV 2024, arXiv 2403.17007), section 3,
subcaption-specific grouping, which is that of SPARC (arXiv 2401.09865). For text t of an image with P patches p, all
normalised:

    w_p = <u_t, p>,  from 0 to 1 by the smallest and the largest over p;  0 if below 1 / P;  divided by their sum
    g_t = sum of w_p p, normalised
    L   = cross-entropy of scale * <g_t, u_s> with s = t, over the texts s of the image, and likewise over g, halved

added to the loss of the flags, which compares the whole image with each text (multi-positive).

What differs: the released code compares over the whole batch, with a temperature of its own and patches that are not
projected, and does not run as released; this is the paper's form, in which only texts of the same image are negatives.
The temperature is the model's. Use texts without corner tokens, as the recipe does: a corner would count as a text.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from training import Experiment
from training.data.features import feature_info
from training.model.towers.train_model import PatchModel


class DreamLip(Experiment):
    def __init__(self, args):
        super().__init__(args)
        if feature_info(args.train_data):
            raise ValueError(f"--train-data {args.train_data}: cached features have no patches; give images")

    @classmethod
    def add_flags(cls, group):
        group.add_argument("--grouping-weight", type=float, default=1.0, help="weight of sub-captions against patches")

    def model_class(self, kind):
        return PatchModel

    def make_loss(self, loss, core):
        return WithGrouping(loss, self.args.grouping_weight)


class WithGrouping(nn.Module):
    def __init__(self, loss: nn.Module, weight: float):
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, patch_features, **inputs):
        """Adds ``grouping_loss`` to the terms of the loss.

        Args:
            patch_features: [batch, num_patches, dim].
        """
        texts, scale = inputs["text_features"], inputs["logit_scale"]
        return self.loss(**inputs) | {"grouping_loss": self.weight * grouping_loss(patch_features, texts, scale)}


def grouping_loss(patches: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean over images and texts.

    Args:
        patches: [batch, num_patches, dim], in any length.
        texts: [batch, T, dim], normalised.
        scale: factor of the cosines.
    """
    patches = normalize(patches, dim=-1)
    weights = texts @ patches.mT  # [batch, T, num_patches]
    low, high = weights.aminmax(dim=-1, keepdim=True)
    weights = (weights - low) / (high - low).clamp(min=1e-6)
    weights = weights.masked_fill(weights < 1 / patches.shape[1], 0.0)
    grouped = normalize(weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ patches, dim=-1)
    logits = scale * grouped @ texts.mT  # [batch, T, T]
    targets = torch.arange(texts.shape[1], device=texts.device).expand(len(texts), -1)
    return (cross_entropy(logits.mT, targets) + cross_entropy(logits, targets)) / 2  # classes are in dimension 1
