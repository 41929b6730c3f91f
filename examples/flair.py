"""FLAIR's training: each text pools the patches of an image for itself; sigmoid loss with sampled sentences.

    python -m training.main --config flair --model flair-ViT-B-16 --experiment examples/flair.py --train-data ...

Xiao et al., FLAIR: VLM with Fine-grained Language-informed Image Representations (CVPR 2025, arXiv 2412.03561), section
3, text-conditioned pooling, and the released loss. An image has K texts u, the sentences that --text-views samples. Row
i of the text-conditioned loss takes the K texts of image i and one random text of each other image: with N images,
N + K - 1 texts.

    z = scale * <v, u / |u|> + bias,   v = pool(u; patches of image i) / |pool(..)|,   y = 1 for its own texts, else -1
    L_tcs = - sum over rows and texts of log sigmoid(y z) / (N + K - 1)
    L_mps = - sum over all images and all texts of log sigmoid(y (scale * <image, u / |u|> + bias)) / (N K)
    loss  = (L_tcs + L_mps) / 2

What differs: with several processes, the loss is that of one process with the whole batch, up to the random draws; as
released, rows compare the texts of another process as its list was sampled there. The pooling has no weight decay.
"""

import torch
from torch import nn
from torch.nn.functional import logsigmoid, normalize

from training import Experiment
from training.data.features import feature_info
from training.loss import gather_rows
from training.model.towers.train_model import PatchModel


class Flair(Experiment):
    def __init__(self, args):
        super().__init__(args)
        if feature_info(args.train_data):
            raise ValueError(f"--train-data {args.train_data}: cached features have no patches; give images")

    def model_class(self, kind):
        return WithQueries

    def make_loss(self, loss, core):
        if not hasattr(core, "visual_proj"):
            raise ValueError(f"--model {self.args.model}: no text-conditioned pooling; use flair-ViT-B-16")
        return FlairLoss(core.visual_proj.requires_grad_(), loss.rank, loss.world_size)


class WithQueries(PatchModel):
    """Adds the patches, and the text features before they are normalised, which query the pooling."""

    def text_outputs(self, features):
        return super().text_outputs(features) | {"queries": features}


class FlairLoss(nn.Module):
    def __init__(self, pooling: nn.Module, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.pooling, self.rank, self.world_size = pooling, rank, world_size

    def forward(self, image_features, patch_features, queries, logit_scale, logit_bias=0.0, output_dict=True, **_):
        """Returns the terms of this rank's images; averaged over ranks, they are those of the whole batch.

        Args:
            image_features: [batch, dim], normalised.
            patch_features: [batch, num_patches, dim].
            queries: [batch, K, dim], texts that are not normalised.
            logit_scale, logit_bias: scalars.
        """
        batch, num_own = queries.shape[:2]
        everyone = gather_rows(queries, self.world_size)  # [N, K, dim]
        total = len(everyone)
        own = torch.arange(batch, device=queries.device) + self.rank * batch

        logits = logit_scale * image_features @ normalize(everyone.flatten(0, 1), dim=-1).T + logit_bias
        signs = torch.full((batch, total), -1.0, device=queries.device).scatter(1, own[:, None], 1.0)
        mps = -logsigmoid(signs.repeat_interleave(num_own, dim=1) * logits).sum() / (batch * num_own)

        drawn = torch.randint(num_own, (batch, total), device=queries.device)
        others = everyone[torch.arange(total, device=queries.device), drawn]  # [batch, N, dim]
        texts = torch.cat([queries, others], dim=1)
        pooled = normalize(self.pooling(texts, patch_features), dim=-1)
        logits = logit_scale * (pooled * normalize(texts, dim=-1)).sum(-1) + logit_bias
        signs = torch.cat([torch.ones_like(logits[:, :num_own]), -torch.ones_like(logits[:, num_own:])], dim=1)
        # Among the others, the column of the image itself does not count.
        counts = torch.ones_like(logits).scatter(1, num_own + own[:, None], 0.0)
        tcs = -(counts * logsigmoid(signs * logits)).sum() / (total + num_own - 1)
        return {"text_conditioned_loss": self.world_size * tcs / 2, "global_loss": mps / 2}
