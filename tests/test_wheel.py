"""The built wheel alone, outside of a checkout: recipes by name, a training and an evaluation."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import SMALL_LOTLIP
from training.flags.config import RECIPES
from training.flags.parser import parse_args

ROOT = Path(__file__).parents[1]
CODE = """
import json, sys
import training
from training.main import main
assert training.__file__.startswith(sys.argv[1]), training.__file__
sys.exit(any(main(argv) for argv in json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Builds the wheel and unpacks it, which is what pip does with it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves files where it builds
    for name in ("src", "dataloaders"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements-training.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_recipes_train_and_evaluation_run_from_the_wheel_alone(unpacked, scenes, tmp_path):
    assert sorted(p.name for p in RECIPES.glob("*.yaml")) == sorted(p.name for p in unpacked.glob("training/recipes/*"))
    (tmp_path / "small.yaml").write_text("pretrained-image: false\npretrained-text: false\nprecision: fp32\n")
    common = ["--workers", "0", "--device", "cpu", "--logs", tmp_path, *SMALL_LOTLIP, "--name"]
    train = ["--config", "lotlip-cc3m", "small.yaml", "--train-data", scenes / "train", "--batch-size", "20"]
    weights = tmp_path / "t" / "checkpoints" / "epoch_1.pt"
    evaluate = ["--urban1k-retrieval", scenes / "urban1k", "--pretrained", weights]
    commands = [[*train, "--epochs", "1", *common, "t"], [*evaluate, *common, "e"]]
    command = [sys.executable, "-c", CODE, unpacked, json.dumps(commands, default=str)]
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Urban1k" in done.stdout, done.stderr[-2000:]


def test_a_name_that_is_no_recipe_lists_those_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--config", "lotlip-cc4m", "--train-data", "x"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(path.stem in said for path in RECIPES.glob("*.yaml"))
