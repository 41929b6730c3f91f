"""The cost of saving a checkpoint: a copy in memory and a writer thread, against writing while training waits."""

import time
from pathlib import Path

import torch

import training
from benchmarks.measure import Figure, Setting, fastest, reference_captions
from training.loss.caption_loss import LongCaptionLoss
from training.model.assembly.from_flags import make_arranger
from training.model.towers.train_model import TrainModel
from training.train.checkpoint import CheckpointWriter, load_checkpoint
from training.train.optim import parameter_groups
from training.train.step import Stepper

MINUTES = 10  # --save-every-minutes


def run(setting: Setting) -> list[Figure]:
    """Measures steps with one save in between, of the weights and AdamW's state of all parameters."""
    name, num_images, num_steps = setting.pick(
        ("lotlip_tiny", 8, 4), ("lotlip_tiny", 16, 20), ("lotlip_bert-ViT-B-16", 256, 40)
    )
    stepper, inputs = _training(name, num_images, setting)
    stalls = {"baseline": [], "ours": []}

    def content() -> dict:
        state, optimizer = stepper.core.state_dict(), stepper.optimizer.state_dict()
        return {"epoch": 0, "state_dict": state, "optimizer": optimizer}

    def steps(side: str | None) -> None:
        writer = CheckpointWriter(setting.folder)
        for number in range(num_steps):
            stepper([inputs])
            if number == 0 and side:
                start = time.perf_counter()
                if side == "ours":
                    writer.submit(content(), ["ours.pt"])
                else:
                    torch.save(content(), setting.folder / "baseline.pt")
                stalls[side].append(time.perf_counter() - start)
        writer.finish()

    sides = {"none": lambda: steps(None), "baseline": lambda: steps("baseline"), "ours": lambda: steps("ours")}
    for side in ("baseline", "ours"):
        sides[side]()
    _check(setting.folder)
    seconds = fastest(sides, setting)
    added = {side: max(seconds[side] - seconds["none"], min(stalls[side])) for side in stalls}
    size = (setting.folder / "ours.pt").stat().st_size
    return [
        Figure(
            "saving",
            f"a checkpoint of {size / 1e6:,.0f} MB: time that training stands still",
            {"time_ratio": min(stalls["baseline"]) / min(stalls["ours"])},
            {
                "seconds": {side: min(values) for side, values in stalls.items()},
                "seconds_added": added,  # includes the processor time of the writer thread
                f"share_of_time_every_{MINUTES}_minutes": {side: s / (60 * MINUTES) for side, s in added.items()},
            },
        )
    ]


def _training(name: str, num_images: int, setting: Setting) -> tuple[Stepper, dict[str, object]]:
    torch.manual_seed(0)
    model = training.create_model(name, pretrained_text=False, device=setting.device)
    arrange = make_arranger(model, "auto", setting.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.1, None, None), fused=True)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    images = torch.randn(num_images, 3, size, size, device=setting.device)
    captions = arrange(*reference_captions(num_images, 1, model.text.num_corners)).to(setting.device)
    return Stepper(TrainModel(model), model, LongCaptionLoss(), optimizer), {"image": images, "packed_text": captions}


def _check(folder: Path) -> None:
    ours, baseline = load_checkpoint(folder / "ours.pt"), load_checkpoint(folder / "baseline.pt")
    for name, value in baseline["state_dict"].items():
        if ours["state_dict"][name].shape != value.shape:
            raise AssertionError(f"saving: {name} is not what the plain file holds")
