"""Corner tokens that are rewarded for differing: a penalty on the cosine between the text features of a caption.

    python -m training.main --experiment examples/corner_diversity.py --corner-penalty 0.1 --train-data ...

Ours, not published: docs/findings.md asks for it. The penalty is the mean squared cosine of all pairs of [CLS] and
corners of the same long caption, added to the loss that the flags describe. It has been run in the tests only, not on
photographs, so whether it helps is not known.
"""

import torch
from torch import nn

from training import Experiment


class CornerDiversity(Experiment):
    @classmethod
    def add_flags(cls, group):
        group.add_argument("--corner-penalty", type=float, default=0.1, help="weight of the squared cosine with [CLS]")

    def make_loss(self, loss, core):
        return WithPenalty(loss, core.text.num_corners, self.args.corner_penalty)


class WithPenalty(nn.Module):
    def __init__(self, loss: nn.Module, num_corners: int, weight: float):
        super().__init__()
        self.loss, self.num_corners, self.weight = loss, num_corners, weight

    def forward(self, text_features, **inputs):
        """Adds ``corner_penalty`` to the terms of the loss.

        Args:
            text_features: [batch, 1 + num_long * (m + 1), dim], normalised: the short caption first.
        """
        terms = self.loss(text_features=text_features, **inputs)
        captions = text_features[:, 1:].unflatten(1, (-1, self.num_corners + 1))  # [batch, num_long, m + 1, dim]
        first, second = torch.triu_indices(self.num_corners + 1, self.num_corners + 1, 1)
        cosine = (captions[:, :, first] * captions[:, :, second]).sum(-1)
        return terms | {"corner_penalty": self.weight * cosine.square().mean()}
