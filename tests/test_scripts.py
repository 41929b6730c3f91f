"""The launch scripts run commands that our parser accepts."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from dataloaders.scene_drawing import COLOURS, draw_scene, make_scene
from training.data.captions import parse_views
from training.flags.parser import parse_args

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train_single_node.sh": ("cc3m", 1),
    "slurm_cc3m.sh": ("cc3m", 1),
    "slurm_30m.sh": ("30m", 3),
    "slurm_100m.sh": ("100m", 5),
}


@pytest.fixture
def launched(tmp_path):
    """Runs a script with launchers that only print their arguments; returns the words after training.main."""
    say = 'echo "at $MASTER_ADDR:$MASTER_PORT"; printf "%s\\n" "$@"; exit "${SRUN_CODE:-0}"'
    for name in ("torchrun", "srun"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{say}\n")
    answer = "if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo scontrol $*; fi"
    (tmp_path / "scontrol").write_text(f"#!/usr/bin/env bash\n{answer}\n")
    for launcher in tmp_path.iterdir():
        launcher.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "90001", "SLURM_SUBMIT_DIR": str(ROOT)}

    def run(script: str, *flags: str, **more: str) -> tuple[str, list[str]]:
        env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "/d", "MASTER_ADDR": ""} | more
        command = ["bash", str(ROOT / "scripts" / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == int(more.get("SRUN_CODE", 0)), done.stderr
        first, *words = done.stdout.splitlines()
        return first, words[words.index("training.main") + 1 :]

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_pretraining_scripts(script, launched):
    where, words = launched(script, "--batch-size", "7")
    args = parse_args(words)
    scale, num_sources = SCRIPTS[script]
    assert args.name == f"lotlip-{scale}" and len(args.train_data.split("::")) == num_sources
    assert args.lock_image and args.pretrained_image and args.text_views == "raw, long*3" and args.batch_size == 7
    if script.startswith("slurm"):
        assert where == "at node7:30001"


def test_finetuning_script(launched):
    args = parse_args(launched("finetune_openai_clip.sh")[1])
    assert args.model == "ViT-B-16-quickgelu" and args.pretrained == "openai" and args.context_length == 248


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [
        *[(0, 0, False), (75, 500, True), (138, 0, True), (70, 3, True), (70, 10, False), (1, 0, False)],
        *[(137, 3, True), (134, 10, False), (130, 0, False)],  # killed, aborted, Ctrl-C
    ],
)
def test_a_stopped_job_is_requeued(code, restarts, queued, launched):
    _, words = launched("slurm_30m.sh", SRUN_CODE=str(code), SLURM_RESTART_COUNT=str(restarts))
    assert (words[-1] == "scontrol requeue 90001") == queued


@pytest.mark.parametrize("recipe", sorted((ROOT / "scripts" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_without_a_warning_and_name_the_source_of_each_line(recipe, capsys):
    args = parse_args(["--train-data", "d.tar", "--config", str(recipe), "--name", "own"])
    assert parse_views(args.text_views) and args.lr and capsys.readouterr().err == ""
    for line in recipe.read_text().splitlines():
        if line and not line.startswith(("#", " ", "name:", "config:")):
            assert re.search(r" # [PILNO?](  |$)", line), line


def recipe_args(name: str) -> dict:
    return vars(parse_args(["--train-data", "d.tar", "--config", str(ROOT / "scripts" / "recipes" / f"{name}.yaml")]))


def test_lotlips_three_scales_differ_only_in_their_name():
    first, *others = (recipe_args(f"lotlip-{scale}") for scale in ("cc3m", "30m", "100m"))
    for other in others:
        assert {key for key in first if first[key] != other[key]} == {"name", "config"}


def test_the_demo_locks_a_tower_that_sees_what_is_in_a_scene():
    folder = ROOT / "scripts/demo_model"
    model = training.create_model(
        f"config:{folder / 'lotlip_demo.json'}", pretrained_image_path=str(folder / "image_tower.safetensors")
    )
    scenes = [make_scene(3, "test", index) for index in range(400)]
    pixels = torch.stack([torch.from_numpy(np.array(draw_scene(scene))) for scene in scenes]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = model.visual.trunk.eval()(pixels / 127.5 - 1).double()
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    labels = torch.tensor([list(COLOURS).index(scene.objects[0].colour) for scene in scenes])
    # A linear map from 300 scenes: at chance, an eighth of the large objects' colours would be right.
    weights = torch.linalg.lstsq(features[:300], torch.eye(8).double()[labels[:300]]).solution
    assert ((features[300:] @ weights).argmax(1) == labels[300:]).double().mean() > 0.6
