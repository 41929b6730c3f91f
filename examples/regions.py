"""FG-CLIP's region loss: the patches in a box are compared with the text of the box.

    python -m training.main --experiment examples/regions.py --regions 4 --train-data ...

Xie et al., FG-CLIP: Fine-Grained Visual and Textual Alignment (ICML 2025, arXiv 2505.05071), section 3, regional
contrastive learning. A sample's JSON has "regions": [{"box": [left, top, right, bottom], "text": ...}, ...] with
fractions of the image's width and height. With the K boxes of a batch, r their features (RoIAlign of the patches to 1 x
1, normalised), l the features of their texts, and a temperature of its own:

    L = - 1 / 2K * sum over i of [log softmax over j of (scale * <l_i, r_j>) at i + the same of <r_i, l_j>]

times 0.1, as in the released code, added to the loss of the flags.

What differs: the first --regions boxes of each sample are used. All processes' boxes are compared, in the released code
those of one process. The patches are those of the last layer, in the released code without its attention.
The image is resized as a whole and not cropped, so that boxes keep their places.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import roi_align
from torchvision.transforms import Compose, RandomResizedCrop, Resize

from training import Experiment
from training.data.features import feature_info
from training.flags.types import positive
from training.loss import gather_rows
from training.model.towers.train_model import PatchModel


class Regions(Experiment):
    def __init__(self, args):
        super().__init__(args)
        if feature_info(args.train_data):
            raise ValueError(f"--train-data {args.train_data}: cached features have no patches; give images")
        if args.strong_augment or args.aug_cfg:
            raise ValueError("--strong-augment, --aug-cfg: boxes do not follow augmentation; omit these flags")

    @classmethod
    def add_flags(cls, group):
        group.add_argument("--regions", type=positive, default=4, metavar="N", help="boxes of a sample")
        group.add_argument("--region-weight", type=float, default=0.1, help="weight of boxes against their texts")

    def image_transform(self, transform):
        def uncropped(step):
            return Resize(step.size, step.interpolation) if isinstance(step, RandomResizedCrop) else step

        return Compose([uncropped(step) for step in transform.transforms])

    def views(self, texts, record, at):
        found = [region["text"] for region in record.get("regions", [])[: self.args.regions]]
        return [*texts, *found, *["-"] * (self.args.regions - len(found))]

    def sample_fields(self, record, texts):
        found = [region["box"] for region in record.get("regions", [])[: self.args.regions]]
        missing = self.args.regions - len(found)
        boxes = torch.tensor([*found, *[[0.0, 0.0, 1.0, 1.0]] * missing])
        return {"boxes": boxes, "is_box": torch.arange(self.args.regions) < len(found)}

    def model_class(self, kind):
        return PatchModel

    def make_loss(self, loss, core):
        return WithRegions(loss, self.args.region_weight, loss.rank, loss.world_size)


class WithRegions(nn.Module):
    def __init__(self, loss: nn.Module, weight: float, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.loss, self.weight, self.rank, self.world_size = loss, weight, rank, world_size
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, text_features, patch_features, boxes, is_box, **inputs):
        """Adds ``region_loss`` to the terms of the loss.

        Args:
            text_features: [batch, T + R, dim]: the texts, then those of R boxes; normalised.
            patch_features: [batch, num_patches, dim].
            boxes: [batch, R, 4], left, top, right, bottom as fractions.
            is_box: [batch, R] bool; others stand for boxes that a sample lacks.
        """
        texts, of_boxes = text_features.split([text_features.shape[1] - boxes.shape[1], boxes.shape[1]], dim=1)
        regions = box_features(patch_features, boxes)
        loss = self.region_loss(regions.flatten(0, 1), of_boxes.flatten(0, 1), is_box.flatten())
        return self.loss(text_features=texts, **inputs) | {"region_loss": self.weight * loss}

    def region_loss(self, regions: torch.Tensor, texts: torch.Tensor, is_box: torch.Tensor) -> torch.Tensor:
        """The loss of this rank's boxes [n, dim]; averaged over ranks, it is that of all boxes."""
        everyone = gather_rows(torch.stack([regions, texts], dim=1), self.world_size)
        counted = gather_rows(is_box.float(), self.world_size)
        targets = torch.arange(len(regions), device=regions.device) + self.rank * len(regions)
        left_out = (counted == 0).expand(len(regions), -1).scatter(1, targets[:, None], False)
        sides = ((regions, everyone[:, 1]), (texts, everyone[:, 0]))
        losses = [
            cross_entropy(
                (self.logit_scale.exp() * a @ b.T).masked_fill(left_out, -torch.inf), targets, reduction="none"
            )
            for a, b in sides
        ]
        return self.world_size * (sum(losses) * is_box).sum() / (2 * counted.sum().clamp(min=1))


def box_features(patches: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normalised features [batch, R, dim] of boxes, from the patches [batch, height * width, dim] of square images."""
    side = math.isqrt(patches.shape[1])
    features = patches.mT.unflatten(2, (side, side))
    number = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    rows = torch.cat([number[:, None], boxes.flatten(0, 1) * side], dim=1)
    found = roi_align(features, rows, 1, 1.0, -1, True)[..., 0, 0]
    return normalize(found, dim=-1).unflatten(0, boxes.shape[:2])
