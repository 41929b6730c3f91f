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
        variance: instead of `components`: use the fewest components that explain this fraction of the variance.

    Source: Long-CLIP (arXiv 2403.15378), HiMo-CLIP (arXiv 2511.06653).
    """
    if variance is None and components >= min(len(features) - 1, features.shape[1]):
        return features  # the components explain all of the variance
    mean = features.mean(0)
    centred = features - mean
    return _Projector.apply(centred @ centred.T, components, variance) @ centred + mean


class _Projector(torch.autograd.Function):
    """Projector [n, n] onto the eigenvectors with the largest eigenvalues of a symmetric matrix.

    Differentiating through the decomposition would divide by the differences between all eigenvalues, and some
    eigenvalues of a centred batch nearly coincide. The projector's gradient needs only the differences between the
    chosen eigenvalues and the rest. Which ones are chosen stays on the device.
    """

    @staticmethod
    def forward(ctx, matrix: torch.Tensor, components: int | None, variance: float | None) -> torch.Tensor:
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))  # descending
        if variance is None:
            chosen = torch.arange(len(values), device=values.device) < components
        else:  # as long as the larger eigenvalues explain too little
            chosen = values.cumsum(0) - values < variance * values.sum()
        ctx.save_for_backward(values, vectors, chosen)
        return (vectors * chosen) @ vectors.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values, vectors, chosen = ctx.saved_tensors
        gap = torch.where(~chosen[:, None] & chosen, values - values[:, None], torch.inf)  # [rest, chosen]
        half = vectors @ (vectors.T @ (grad + grad.T) @ vectors / gap / 2) @ vectors.T
        return half + half.T, None, None
