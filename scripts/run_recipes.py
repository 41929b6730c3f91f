"""Runs every recipe of scripts/recipes for 300 steps on drawn scenes and records its losses in figures/recipes.json.

    python scripts/run_recipes.py [logs/recipes]        half an hour on one core; then make figures

The models are small: towers of 3 and 2 layers, images of 64 x 64 pixels. Instead of published weights, recipes start
from the weights of clip.yaml, which runs first: from both towers if CLIP is fine-tuned, from the image tower if it is
locked. figures/recipes.json lists all other differences from the recipe.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import training

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "figures" / "recipes.json"
FIRST = "clip"  # other recipes start from its weights
SCRATCH = ("dreamlip", "flair")
FINE_TUNED = ("finetune-openai-clip", "long-clip", "debias-clip", "himo-clip")
LOCKED = ("lit", "lotlip-cc3m")  # lotlip-30m and lotlip-100m have the same flags
SCALE = "--batch-size 32 --epochs 2 --warmup 30 --precision fp32 --workers 1 --log-every-n-steps 10 --save-frequency 2"
LONG_KEYS = ["--long-caption-keys", "longIB_captions,longSV_captions,longLLA_captions"]


def main() -> int:
    """Runs all recipes; returns the exit code of the first one that failed, else 0."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "logs/recipes")
    if not (out / "data" / "train").is_dir():
        call("dataloaders.scenes", out / "data", "--train", 4800, "--test", 1)
    clip = write_clip_config(out / "clip_tiny.json")
    content = {"scenes": 4800, "flags of all": SCALE, "recipes": {}}
    for name in (FIRST, *SCRATCH, *FINE_TUNED, *LOCKED):
        flags = ["--model", f"config:{clip}"]
        if name in FINE_TUNED:
            flags += ["--pretrained", out / FIRST / "checkpoints" / "epoch_2.pt", "--lr", "1e-4"]
        if name in LOCKED:
            (out / "own_image.yaml").write_text("pretrained-image: false\n")
            flags = ["--config", out / "own_image.yaml", "--model", "lotlip_tiny", "--pretrained"]
            flags += [write_locked_start(out / FIRST / "checkpoints" / "epoch_2.pt", out / "locked_start.pt", name)]
        shutil.rmtree(out / name, ignore_errors=True)
        recipe = ["--config", ROOT / "scripts" / "recipes" / f"{name}.yaml"]
        where = ["--train-data", out / "data" / "train", "--logs", out, "--name", name, *LONG_KEYS]
        if code := call("training.main", *recipe, *where, *SCALE.split(), *flags):
            return code
        content["recipes"][name] = {"flags": " ".join(map(str, flags)).replace(str(out), "LOGS"), **losses(out / name)}
        RECORD.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def call(module: str, *words: object) -> int:
    """Prints and runs a command; returns its exit code."""
    command = ["python", "-m", module, *map(str, words)]
    print(" ".join(command), flush=True)
    return subprocess.run([sys.executable, *command[1:]]).returncode


def write_clip_config(path: Path) -> Path:
    """Writes the config of a small CLIP with the image tower of lotlip_tiny."""
    config = json.loads((ROOT / "src/training/model/model_configs/lotlip_tiny.json").read_text())
    config["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}
    path.write_text(json.dumps(config))
    return path


def write_locked_start(checkpoint: Path, path: Path, name: str) -> Path:
    """Writes weights of lotlip_tiny with the image tower of a checkpoint and an untrained text tower."""
    corners = {"num_corner_tokens": 0} if name == "lit" else {}
    model = training.create_model("lotlip_tiny", pretrained_text=False, **corners)
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    model.visual.load_state_dict({k.removeprefix("visual."): v for k, v in trained.items() if k.startswith("visual.")})
    torch.save(model.state_dict(), path)
    return path


def losses(run: Path) -> dict[str, object]:
    """Returns the steps of a run, and the total loss and each term at these steps, rounded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    names = [name for name in rows[0] if name.startswith("train/") and name.endswith("loss")]
    curves = {name.removeprefix("train/"): [round(row[name], 4) for row in rows] for name in names}
    return {"steps": [row["step"] for row in rows], "losses": curves}


if __name__ == "__main__":
    sys.exit(main())
