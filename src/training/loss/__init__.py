"""Losses between images and several captions per image; usable without the rest of the project."""

from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss
from training.loss.terms import LossTerm

__all__ = ["LongCaptionLoss", "LongCaptionSigLipLoss", "LossTerm"]
