"""Loss terms: each compares one form of the image features with some of the text features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

NORMALISATIONS = ("published", "per-term")


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss.

    Attributes:
        name: key in the loss's output and in the log; ends in ``_loss``.
        texts: indices into a sample's T text features; None means all but the first.
        weight: factor of the term in the sum.
        image_form, text_form: functions from this process's features [batch, dim] to the features [batch, dim] that the
            term compares, such as `reduce_features`; None compares the features as they are.
    """

    name: str
    texts: Sequence[int] | None = None
    weight: float = 1.0
    image_form: Callable[[torch.Tensor], torch.Tensor] | None = None
    text_form: Callable[[torch.Tensor], torch.Tensor] | None = None

    def columns(self, num_texts: int) -> list[int]:
        """Returns the indices of this term's text features, of T = `num_texts`."""
        return list(range(1, num_texts) if self.texts is None else self.texts)


def reduce_features(
    features: torch.Tensor, components: int | None = None, variance: float | None = None
) -> torch.Tensor:
    """Projects features [n, dim] onto principal components of the batch.

    Long-CLIP reduces image features for short captions, HiMo-CLIP text features. The features are centred and
    projected, and their mean is added back; the result is not normalised. Gradients flow through the projection, too.

    Args:
        features: features of this process's batch, [n, dim].
        components: number of components; with min(n - 1, dim) or more, the features are returned unchanged.
        variance: instead of `components`: use the fewest components that explain this fraction of the variance. This
            synchronises with the device.

    Source: Long-CLIP (arXiv 2403.15378), HiMo-CLIP (arXiv 2511.06653).
    """
    mean = features.mean(0)
    centred = features - mean
    if variance is not None:
        squares = torch.linalg.svdvals(centred.detach()).square()
        components = int((squares.cumsum(0) < variance * squares.sum()).sum()) + 1
    if components >= min(len(features) - 1, features.shape[1]):
        return features  # the components explain all of the variance
    return _Projector.apply(centred @ centred.T, components) @ centred + mean


class _Projector(torch.autograd.Function):
    """Projector [n, n] onto the eigenvectors with the k largest eigenvalues of a symmetric matrix.

    Differentiating through the decomposition would divide by the differences between all eigenvalues, and some
    eigenvalues of a centred batch nearly coincide. The projector's gradient needs only the differences between the k
    largest eigenvalues and the rest.
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
