"""The forward pass of training, from pixels and captions to the loss's inputs, as the single call that DDP needs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from training.data.images import normalise_pixels
from training.model.packing import Captions
from training.model.towers.corner import features_of_captions
from training.model.towers.encoders import text_encoder
from training.model.towers.flair import encode_with_patches
from training.model.towers.locking import linear_head, rest_frozen


class TrainModel(nn.Module):
    """Both towers in one `forward`.

    A locked image tower runs in eval mode and without a graph; frozen parts of other towers run in eval mode. Packed
    captions (see `packing`) go through the text tower in one call. Otherwise short and long captions are encoded
    separately, because a short caption padded to the length of the long ones would be mostly padding.

    Args:
        model: one of our models, or of open_clip's (which gives one feature per caption).
        mean, std: per channel, to normalise uint8 images.
        corners: for each text of a sample, whether it contributes all m + 1 features or only [CLS]; further texts
            contribute only [CLS]. None: all features of all texts but the first.

    An experiment subclasses it to add outputs for its loss, see `PatchModel`. Each output has one row per image or is a
    scalar, so that micro-batches can be joined.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: Any,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        corners: Sequence[bool] | None = None,
    ):
        super().__init__()
        self.model, self.corners = model, corners
        self.text = text_encoder(model)
        device = model.logit_scale.device
        self.register_buffer("mean", torch.tensor(mean, device=device)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device)[:, None, None], persistent=False)
        # The only convolution of a vision transformer cuts patches, for which the order of pixels does not matter.
        self.is_convolutional = sum(isinstance(module, nn.Conv2d) for module in model.visual.modules()) > 1
        self.image_is_locked = not any(p.requires_grad for p in model.visual.parameters())

    def train(self, mode: bool = True) -> "TrainModel":
        super().train(mode)
        rest_frozen(self)
        if self.image_is_locked:
            self.model.visual.eval()
        return self

    def forward(
        self,
        image: Any = None,
        text: Any = None,
        long_text: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        packed_text: Captions | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encodes a batch, given one form of the images and one form of the captions.

        Args:
            image: [batch, 3, H, W], normalised or uint8.
            text: short captions, [batch, length].
            long_text: long captions, [batch, K, length]; None if there are none.
            image_features: cached features of the locked tower instead of `image`: [batch, dim], or [batch, trunk_dim]
                if the tower has a linear head.
            packed_text: all short captions, then all long ones, instead of `text` and `long_text`.

        Returns:
            ``image_features`` [batch, dim]; ``text_features`` [batch, T, dim], or [batch, dim] if K = 0; both
            normalised; ``logit_scale``, exponentiated; ``logit_bias`` if the model has one.
        """
        output = self.encode_images(image, image_features)
        batch = len(output["image_features"])
        if packed_text is not None:
            features = self.text.packed_features(packed_text)
            short, long = features[:batch], features[batch:]
        else:
            short = self.text.features(text)
            long = short[:0] if long_text is None else self.text.features(long_text.flatten(0, 1))
        texts = [short, *long.unflatten(0, (batch, -1)).unbind(1)] if len(long) else [short]
        output |= self.text_outputs(features_of_captions(texts, self.corners))
        output["logit_scale"] = self.model.logit_scale.exp()
        if getattr(self.model, "logit_bias", None) is not None:
            output["logit_bias"] = self.model.logit_bias
        return output

    def text_outputs(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the outputs that are made of text features [batch, T, dim], which are not normalised."""
        return {"text_features": normalize(features if features.shape[1] > 1 else features[:, 0], dim=-1)}

    def encode_images(self, image: Any = None, image_features: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Returns normalised ``image_features`` [batch, dim] of images or of cached features.

        For a locked tower there is no graph, and this is called apart from `forward`, which then gets the result.
        """
        if image_features is not None:
            head = linear_head(self.model.visual)
            image_features = image_features.float()
            return {"image_features": normalize(image_features if head is None else head(image_features), dim=-1)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_is_locked):
            return self.image_outputs(self.pixels(image))

    def image_outputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the outputs that are made of images [batch, 3, H, W], with normalised ``image_features``."""
        return {"image_features": self.model.encode_image(pixels, normalize=True)}

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images as the tower takes them: normalised, in its dtype."""
        dtype = next(self.model.visual.parameters()).dtype
        memory_format = torch.channels_last if images.is_cuda and self.is_convolutional else torch.contiguous_format
        if images.dtype == torch.uint8:
            return normalise_pixels(images, self.mean, self.std, dtype, memory_format)
        return images.to(dtype, memory_format=memory_format)


class PatchModel(TrainModel):
    """A `TrainModel` whose output has ``patch_features`` [batch, num_patches, dim], too, from the same pass.

    They are those of the last layer after its norm, projected like the pooled token, and not normalised. The image
    tower is a vision transformer of open_clip, or one of timm with a `linear_head`. Cached features have no patches.
    """

    def image_outputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `TrainModel.image_outputs`."""
        features, patches = encode_with_patches(self.model.visual, pixels)
        return {"image_features": normalize(features, dim=-1), "patch_features": patches}
