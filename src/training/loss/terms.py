"""What a loss is made of: terms that each compare one form of the images with some of the texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

NORMALISATIONS = ("published", "per-term")


@dataclass(frozen=True)
class LossTerm:
    """One term.

    Attributes:
        name: key in the loss's output, ending in ``_loss``; the log shows it.
        texts: which of a sample's T text features; None takes all but the first.
        weight: factor.
        image_components: compare with the image features reduced to so many principal components of this process's
            batch, as Long-CLIP does with short captions; None compares with the features themselves.
        text_variance: compare reduced text features: as many principal components as hold this share of the variance
            of this process's batch, as HiMo-CLIP does; None compares the features themselves.
    """

    name: str
    texts: Sequence[int] | None = None
    weight: float = 1.0
    image_components: int | None = None
    text_variance: float | None = None

    def columns(self, num_texts: int) -> list[int]:
        """The text features of this term."""
        return list(range(1, num_texts) if self.texts is None else self.texts)


def reduce_features(
    features: torch.Tensor, components: int | None = None, variance: float | None = None
) -> torch.Tensor:
    """Replaces features [n, dim] by their projection on principal components of the batch.

    The features are centred and projected, and their mean is added again; they are not normalised. Gradients flow
    through the projection, too.

    Args:
        features: of this process's batch, [n, dim].
        components: number of components; `dim`, or one fewer than the rows of the batch, leaves features as they are.
        variance: in place of `components`: as few as hold this share of the variance (this waits for the device).

    Source: Long-CLIP (arXiv 2403.15378), HiMo-CLIP (arXiv 2511.06653).
    """
    mean = features.mean(0)
    centred = features - mean
    if variance is not None:
        squares = torch.linalg.svdvals(centred.detach()).square()
        components = int((squares.cumsum(0) < variance * squares.sum()).sum()) + 1
    if components >= min(len(features) - 1, features.shape[1]):
        return features  # these components hold all of the variance
    return _Projector.apply(centred @ centred.T, components) @ centred + mean


class _Projector(torch.autograd.Function):
    """Projector [n, n] on the eigenvectors of a symmetric matrix with the k largest eigenvalues.

    Differentiating through the decomposition itself would divide by the differences of all eigenvalues, and those of
    a centred batch hold pairs that nearly coincide; the projector depends on those between the two groups alone.
    """

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, components: int) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)  # ascending
        ctx.save_for_backward(values, vectors)
        ctx.components = components
        chosen = vectors[:, -components:]
        return chosen @ chosen.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        values, vectors = ctx.saved_tensors
        rest, chosen = vectors[:, : -ctx.components], vectors[:, -ctx.components :]
        gap = values[-ctx.components :] - values[: -ctx.components, None]  # [n - k, k]
        inner = rest.T @ (grad + grad.T) @ chosen / gap / 2
        half = rest @ inner @ chosen.T
        return half + half.T, None
