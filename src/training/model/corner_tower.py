"""What both text towers with corner tokens share: features of single captions and of several captions per image."""

import torch
from torch import nn

from training.model.corner import features_of_captions
from training.model.locking import rest_frozen


class CornerTower(nn.Module):
    """A text tower with corner tokens.

    It takes token ids [batch, seq_len] and returns [batch, dim], or [batch, num_captions, seq_len] and returns
    [batch, T, dim] with T = 1 + (num_captions - 1)(m + 1): see `corner.features_of_captions`.
    """

    num_corners: int
    context_length: int
    vocab_size: int
    pad_id: int

    def train(self, mode: bool = True) -> "CornerTower":
        """As `nn.Module.train`; frozen parts stay in evaluation mode, so that their dropout stays off."""
        super().train(mode)
        return rest_frozen(self)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq_len] -> [batch, m + 1, dim]: the pooled token's feature, then one per corner, not normalised."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Features, not normalised.

        Args:
            ids: [batch, seq_len], or [batch, num_captions, seq_len] with the short caption first.

        Returns:
            [batch, dim], or [batch, T, dim].
        """
        if ids.ndim == 2:
            return self.all_features(ids)[:, 0]
        return features_of_captions(self.all_features(ids.flatten(0, 1)), ids.shape[0])
