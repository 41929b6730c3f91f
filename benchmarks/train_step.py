"""A whole training step with a locked image tower: forward of both towers, loss, backward, AdamW."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from open_clip import CustomTextCLIP
from torch import nn
from torch.nn.functional import normalize

import training
from benchmarks import published
from benchmarks.measure import Figure, Setting, check_close, fastest, largest_that_fits, peak_bytes, reference_captions
from training.loss.caption_loss import LongCaptionLoss
from training.model.assembly.from_flags import make_arranger
from training.model.towers.train_model import TrainModel
from training.train.optim import parameter_groups
from training.train.step import Stepper


class _PublishedModel(nn.Module):
    """Both towers in the published scheme: images pass the locked tower, all captions are padded in one batch."""

    def __init__(self, model: CustomTextCLIP):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            image_features = self.model.encode_image(image, normalize=True)
        return {
            "image_features": image_features,
            "text_features": normalize(published.text_features(self.model.text, text), dim=-1),
            "logit_scale": self.model.logit_scale.exp(),
        }


def _published_loss(image_features, text_features, logit_scale, output_dict: bool) -> dict[str, torch.Tensor]:
    return {"loss": published.loss(image_features, text_features, logit_scale)}


def run(setting: Setting) -> Iterator[Figure]:
    """1 raw + 1 long caption, 1 raw + 3 long ones, and 1 + 1 with cached image features on our side.

    Images are random pixels, so that no loading is counted.
    """
    name, num_images = setting.pick(("lotlip_tiny", 16), ("lotlip_tiny", 64), ("lotlip_bert-ViT-B-16", 1024))
    start = _make_model(name).to(setting.device)
    for figure, num_long, is_cached in (
        ("train_step", 1, False),
        ("train_step_3_long", 3, False),
        ("train_step_cached", 1, True),
    ):
        yield largest_that_fits(partial(_figure, figure, name, start, num_long, is_cached, setting), num_images)


def _make_model(name: str) -> CustomTextCLIP:
    """A model without dropout, because both sides must give the same."""
    torch.manual_seed(0)
    model = training.create_model(name, pretrained_text=False)
    model.lock_image_tower()
    for module in model.text.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.text.transformer.config.attention_probs_dropout_prob = 0.0
    return model


def _figure(
    figure: str, name: str, start: CustomTextCLIP, num_long: int, is_cached: bool, setting: Setting, num_images: int
) -> Figure:
    sides = _make_sides(start, num_long, is_cached, setting, num_images)
    losses = {side: work()["loss"] for side, work in sides.items()}
    tolerance = 2e-2 if setting.on_gpu else 1e-4
    check_close(f"{figure}, loss of the first step", losses["ours"], losses["baseline"], tolerance)
    losses = {side: work()["loss"] for side, work in sides.items()}
    check_close(f"{figure}, loss of the second step", losses["ours"], losses["baseline"], 10 * tolerance)
    seconds = fastest(sides, setting)
    memory = {side: peak_bytes(work, setting) for side, work in sides.items()}
    cached = ", our side with cached image features" if is_cached else ""
    return Figure(
        figure,
        f"training step: {name}, locked image tower, {num_images:,} x (1 raw + {num_long} long){cached}",
        {"time_ratio": seconds["baseline"] / seconds["ours"], "memory_ratio": memory["baseline"] / memory["ours"]},
        {
            "seconds": seconds,
            "peak_bytes": memory,
            "samples_per_s": {side: num_images / value for side, value in seconds.items()},
        },
    )


def _make_sides(
    start: CustomTextCLIP, num_long: int, is_cached: bool, setting: Setting, num_images: int
) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Returns one step of each side, of copies of `start` on the same batch."""
    size = start.visual.image_size
    size = size if isinstance(size, int) else size[0]
    torch.manual_seed(1)
    images = torch.randn(num_images, 3, size, size, device=setting.device)
    short, long = reference_captions(num_images, num_long, start.text.num_corners)
    padded = torch.cat([short[:, None], long], dim=1)
    models = {"baseline": copy.deepcopy(start), "ours": copy.deepcopy(start)}
    arrange = make_arranger(models["ours"], "auto", setting.device)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if setting.on_gpu else nullcontext
    ours = TrainModel(models["ours"])
    steppers = {
        "baseline": _stepper(_PublishedModel(models["baseline"]), models["baseline"], _published_loss, autocast, False),
        "ours": _stepper(ours, models["ours"], LongCaptionLoss(), autocast, True),
    }
    steppers["ours"].locked_images = ours.encode_images
    seen = {"image": images}
    if is_cached:
        with torch.no_grad(), autocast():
            seen = {"image_features": start.encode_image(images)}
    inputs = {
        "baseline": lambda: {"image": images, "text": padded.to(setting.device)},
        "ours": lambda: seen | {"packed_text": arrange(short, long).to(setting.device)},
    }
    return {side: partial(_step, steppers[side], inputs[side]) for side in steppers}


def _stepper(model: nn.Module, core: nn.Module, loss: object, autocast: object, fused: bool) -> Stepper:
    optimizer = torch.optim.AdamW(parameter_groups(core, 1e-4, 0.2, None, None), fused=fused)
    return Stepper(model.train(), core, loss, optimizer, autocast=autocast)


def _step(stepper: Stepper, inputs: object) -> dict[str, torch.Tensor]:
    return stepper([inputs()])
