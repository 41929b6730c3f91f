"""HN-CLIP's scaled logits: a negative counts the more, the more similar its caption is to the right one.

    python -m training.main --experiment examples/hn_clip.py --hn-gamma 0.5 --train-data ...
    python -m training.main --experiment examples/hn_clip.py --siglip --train-data ...

Formula of HN-CLIP (arXiv, August 2026), as described in other papers' tables; its code was not available to us:

    logits = scale * (image . text^T + gamma * stop_gradient(text . text^T without its diagonal)),   gamma = 0.5

What differs: with several texts of a sample (the short caption, [CLS] and corners of the long ones), each is compared
with the images on its own, and the losses are averaged. For the sigmoid loss (--siglip) there is no published formula:
the same logits are used, plus the model's bias.
"""

import torch
from torch import nn
from torch.nn import functional

from training import Experiment
from training.loss import gather_rows


class HNClip(Experiment):
    @classmethod
    def add_flags(cls, group):
        group.add_argument(
            "--hn-gamma", type=float, default=0.5, help="weight of the captions' similarity in the logits"
        )

    def make_loss(self, loss, core):
        return ScaledLogits(self.args.hn_gamma, self.args.siglip, loss.rank, loss.world_size)


class ScaledLogits(nn.Module):
    def __init__(self, gamma: float, sigmoid: bool = False, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.gamma, self.sigmoid, self.rank, self.world_size = gamma, sigmoid, rank, world_size

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=True, **_):
        """Returns the loss of this rank's rows; averaged over ranks, it is that of the whole batch.

        Args:
            image_features: [batch, dim].
            text_features: [batch, dim] or [batch, T, dim].
            logit_scale, logit_bias: scalars.
        """
        texts = text_features if text_features.ndim == 3 else text_features[:, None]
        everyone = gather_rows(torch.cat([image_features[:, None], texts], dim=1), self.world_size)
        targets = torch.arange(len(texts), device=texts.device) + self.rank * len(texts)
        losses = []
        for column in range(texts.shape[1]):
            mine, all_texts = texts[:, column], everyone[:, 1 + column]
            alike = (mine @ all_texts.T).detach().scatter(1, targets[:, None], 0.0)
            of_images = logit_scale * (image_features @ all_texts.T + self.gamma * alike)
            of_texts = logit_scale * (mine @ everyone[:, 0].T + self.gamma * alike)
            losses.append(self._compare(of_images, of_texts, targets, logit_bias))
        return {"hn_clip_loss": torch.stack(losses).mean()}

    def _compare(self, of_images, of_texts, targets, bias):
        if not self.sigmoid:
            return (functional.cross_entropy(of_images, targets) + functional.cross_entropy(of_texts, targets)) / 2
        signs = torch.full_like(of_images, -1.0).scatter(1, targets[:, None], 1.0)
        return -functional.logsigmoid(signs * (of_images + bias)).sum() / len(of_images)
