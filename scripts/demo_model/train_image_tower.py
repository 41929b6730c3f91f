"""Trains the image tower that the demo locks. It is to the scenes what an ImageNet tower is to photographs.

    python scripts/demo_model/train_image_tower.py [OUT.safetensors] [--scenes 30000] [--epochs 12]

The tower is timm's test_resnet at 64 x 64 pixels. It learns without any text what is in a scene: the colours and shapes
in each of nine places, the kind of the large object, the kinds of the small ones, and the background. Its scenes are a
split of their own, `tower`, which nothing else draws. The default of OUT is image_tower.safetensors beside this file,
in 16 bits. The file in the repository was trained with these settings, by an earlier form of this program.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from tqdm import tqdm

import training
from dataloaders.scene_drawing import BACKGROUNDS, COLOURS, SHAPES, draw_scene, make_scene

HERE = Path(__file__).parent
BATCH_SIZE = 192
LEARNING_RATE = 3e-3
SCALE = 12  # of normalised features before the linear head, so that its logits are large enough
PLACES = [f"{v} {h}".strip() or "middle" for v in ("top", "", "bottom") for h in ("left", "", "right")]
NUM_KINDS = len(COLOURS) * len(SHAPES)
# Columns: colours by place, shapes by place, kind of the large object, kinds of the small ones, background.
STARTS = np.cumsum([0, len(PLACES) * len(COLOURS), len(PLACES) * len(SHAPES), NUM_KINDS, NUM_KINDS, len(BACKGROUNDS)])
LARGE = slice(STARTS[2], STARTS[3])


def example(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels [64, 64, 3] of scene number `index` and its 0-1 labels."""
    scene = make_scene(0, "tower", index)
    labels = np.zeros(STARTS[-1], np.float32)
    for number, item in enumerate(scene.objects):
        place, colour, shape = PLACES.index(item.place), list(COLOURS).index(item.colour), SHAPES.index(item.shape)
        labels[STARTS[0] + place * len(COLOURS) + colour] = 1
        labels[STARTS[1] + place * len(SHAPES) + shape] = 1
        labels[STARTS[3 if number else 2] + colour * len(SHAPES) + shape] = 1
    labels[STARTS[4] + list(BACKGROUNDS).index(scene.background)] = 1
    return np.asarray(draw_scene(scene)), labels


def train(tower: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, epochs: int) -> float:
    """Trains a tower in place, except on the last thirtieth of the scenes.

    Args:
        tower: maps pixels [n, 3, 64, 64] to features [n, dim].
        pixels: [num_scenes, 3, 64, 64], uint8.
        labels: [num_scenes, num_labels], 0 or 1.
        epochs: number of passes over the scenes.

    Returns:
        The accuracy of naming the large object in the scenes that were kept.
    """
    kept = len(pixels) // 30
    num_trained = len(pixels) - kept
    steps = num_trained // BATCH_SIZE
    head = nn.Linear(tower(to_input(pixels[:2])).shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.05)
    progress = tqdm(total=epochs * steps, unit="step")
    for _ in range(epochs):
        for chosen in torch.randperm(num_trained)[: steps * BATCH_SIZE].view(steps, BATCH_SIZE):
            logits = head(normalize(tower(to_input(pixels[chosen])), dim=-1) * SCALE)
            loss = binary_cross_entropy_with_logits(logits, labels[chosen], reduction="none").sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.2f}")
    with torch.inference_mode():
        logits = head(normalize(tower.eval()(to_input(pixels[-kept:])), dim=-1) * SCALE)
    return float((logits[:, LARGE].argmax(1) == labels[-kept:, LARGE].argmax(1)).double().mean())


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Returns uint8 pixels as the demo's preprocessing gives them, from -1 to 1."""
    return pixels.float() / 127.5 - 1


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "image_tower.safetensors", metavar="OUT")
    parser.add_argument("--scenes", type=int, default=30_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        pixels, labels = map(np.stack, zip(*pool.map(example, range(args.scenes), chunksize=256)))
    torch.manual_seed(0)
    tower = training.create_model(f"config:{HERE / 'lotlip_demo.json'}").visual
    accuracy = train(tower, torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels), args.epochs)
    save_file({name: half(value) for name, value in tower.trunk.state_dict().items()}, args.out)
    print(
        f"{args.out}: names {accuracy:.1%} of the large objects in {args.scenes // 30:,} scenes it was not trained on"
    )


def half(value: torch.Tensor) -> torch.Tensor:
    """Returns weights in 16 bits; counters stay as they are."""
    return value.half().contiguous() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
