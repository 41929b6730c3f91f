"""Losses between images and several captions per image; usable without the rest of the project."""

from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss
from training.loss.terms import LossTerm, reduce_features

__all__ = ["LongCaptionLoss", "LongCaptionSigLipLoss", "LossTerm", "reduce_features"]
