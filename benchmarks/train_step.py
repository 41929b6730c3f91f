"""A whole training step with a locked image tower: forward of both towers, loss, backward, AdamW."""

import copy
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.functional import normalize

import training
from benchmarks import published
from benchmarks.measure import Figure, Setting, check_close, fastest, peak_bytes, reference_captions
from training.loss.caption_loss import LongCaptionLoss
from training.model.from_flags import make_arranger
from training.model.text_tower import LotlipCLIP
from training.model.train_model import TrainModel
from training.train.optim import parameter_groups
from training.train.step import Stepper

NUM_LONG = 1


class _PublishedModel(nn.Module):
    """Both towers in the published scheme: images pass the locked tower, all captions are padded in one batch."""

    def __init__(self, model: LotlipCLIP):
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


def run(setting: Setting) -> list[Figure]:
    """1 raw + 1 long caption; images are random pixels, so that no loading is counted."""
    name, num_images = setting.pick(("lotlip_tiny", 16), ("lotlip_tiny", 64), ("lotlip_bert-ViT-B-16", 1024))
    torch.manual_seed(0)
    start = training.create_model(name, pretrained_text=False)
    start.lock_image_tower()
    for module in start.text.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # both sides must give the same
    start.text.transformer.config.attention_probs_dropout_prob = 0.0
    start = start.to(setting.device)
    size = start.visual.image_size
    size = size if isinstance(size, int) else size[0]
    images = torch.randn(num_images, 3, size, size, device=setting.device)
    short, long = reference_captions(num_images, NUM_LONG, start.text.num_corners)
    models = {"baseline": copy.deepcopy(start), "ours": copy.deepcopy(start)}
    arrange = make_arranger(models["ours"], "auto", setting.device, compiled=False)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if setting.on_gpu else nullcontext
    ours = TrainModel(models["ours"])
    steppers = {
        "baseline": _stepper(_PublishedModel(models["baseline"]), models["baseline"], _published_loss, autocast, False),
        "ours": _stepper(ours, models["ours"], LongCaptionLoss(), autocast, True),
    }
    steppers["ours"].locked_images = ours.encode_images
    padded = torch.cat([short[:, None], long], dim=1)
    inputs = {
        "baseline": lambda: {"image": images, "text": padded.to(setting.device)},
        "ours": lambda: {"image": images, "packed_text": arrange(short, long).to(setting.device)},
    }
    sides = {side: partial(_step, steppers[side], inputs[side]) for side in steppers}
    losses = {side: work()["loss"] for side, work in sides.items()}
    tolerance = 2e-2 if setting.on_gpu else 1e-4
    check_close("train_step, loss of the first step", losses["ours"], losses["baseline"], tolerance)
    losses = {side: work()["loss"] for side, work in sides.items()}
    check_close("train_step, loss of the second step", losses["ours"], losses["baseline"], 10 * tolerance)
    seconds = fastest(sides, setting)
    memory = {side: peak_bytes(work, setting) for side, work in sides.items()}
    return [
        Figure(
            "train_step",
            f"training step: {name}, locked image tower, {num_images} x (1 raw + {NUM_LONG} long)",
            {
                "time_ratio": seconds["baseline"] / seconds["ours"],
                "memory_ratio": memory["baseline"] / memory["ours"],
            },
            {
                "seconds": seconds,
                "peak_bytes": memory,
                "samples_per_s": {side: num_images / value for side, value in seconds.items()},
            },
        )
    ]


def _stepper(model: nn.Module, core: nn.Module, loss: object, autocast: object, fused: bool) -> Stepper:
    optimizer = torch.optim.AdamW(parameter_groups(core, 1e-4, 0.2, None, None), fused=fused)
    return Stepper(model.train(), core, loss, optimizer, autocast=autocast)


def _step(stepper: Stepper, inputs: object) -> dict[str, torch.Tensor]:
    return stepper([inputs()])
