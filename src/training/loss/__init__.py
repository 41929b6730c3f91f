"""Losses between images and several captions per image, and their parts; usable without the rest of the project."""

from training.loss.blockwise import cross_entropy, in_blocks, sigmoid_loss, similarities
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss, LossTerm, gather_rows, reduce_features

__all__ = [
    "LongCaptionLoss",
    "LongCaptionSigLipLoss",
    "LossTerm",
    "cross_entropy",
    "gather_rows",
    "in_blocks",
    "reduce_features",
    "sigmoid_loss",
    "similarities",
]
