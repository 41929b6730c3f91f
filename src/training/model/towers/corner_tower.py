"""Base of both text towers with corner tokens: features of single captions, and of several captions per image."""

import torch
from torch import nn

from training.model.towers.corner import features_of_captions
from training.model.towers.locking import rest_frozen


class CornerTower(nn.Module):
    """A text tower with corner tokens.

    It maps token ids [batch, seq_len] to features [batch, dim], and [batch, num_captions, seq_len] to [batch, T, dim]
    with T = 1 + (num_captions - 1)(m + 1): see `corner.features_of_captions`.
    """

    num_corners: int
    context_length: int
    vocab_size: int
    pad_id: int

    def train(self, mode: bool = True) -> "CornerTower":
        """Sets the mode like `nn.Module.train`, but keeps frozen parts in evaluation mode, with dropout off."""
        super().train(mode)
        return rest_frozen(self)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the pooled token's feature, then one feature per corner, not normalised.

        Args:
            ids: [batch, seq_len].

        Returns:
            [batch, m + 1, dim].
        """
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Computes features, not normalised.

        Args:
            ids: [batch, seq_len], or [batch, num_captions, seq_len] with the short caption first.

        Returns:
            [batch, dim], or [batch, T, dim].
        """
        if ids.ndim == 2:
            return self.all_features(ids)[:, 0]
        return features_of_captions(self.all_features(ids.flatten(0, 1)), ids.shape[0])
