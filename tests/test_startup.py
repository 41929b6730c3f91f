"""Commands start fast: they import only what they need, and without garbage collection."""

import os
import subprocess
import sys

import pytest

CODE = """
import gc, os, sys
from training.runtime.processes import first_imports
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
{before}
with first_imports():
    import {modules}
    during = len(collected)
print(during == 0, gc.isenabled(), gc.get_freeze_count() > 10_000, os.environ.get("OMP_WAIT_POLICY"))
print(*sys.modules)
"""
HEAVY = set("pandas sklearn matplotlib tensorboard torch.utils.tensorboard wandb duckdb polars datasets".split())


def run(code: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout.splitlines()


def test_imports_are_few_and_run_without_garbage_collection():
    """open_clip imports heavy packages by itself: transformers 5.4 imports scikit-learn if it is installed."""
    (open_clips_own,) = run("import open_clip, sys; print(*sys.modules)")
    state, modules = run(CODE.format(before="", modules="training.eval.run, training.train.run"))
    assert state == "True True True PASSIVE"
    assert HEAVY & set(modules.split()) == HEAVY & set(open_clips_own.split())


@pytest.mark.parametrize(
    ("before", "found"),
    [("gc.disable()", "True False False None"), ("os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'", "True True True ACTIVE")],
    ids=["the caller's own setting is kept", "the user's threads spin"],
)
def test_what_the_user_has_set_is_kept(before, found):
    assert run(CODE.format(before=before, modules="asyncio, unittest.mock, xml.dom.minidom"))[0] == found


def test_an_evaluation_of_features_does_not_wait_for_a_models_imports():
    (modules,) = run("import training.eval.run, sys; print(*sys.modules)")
    assert not {"open_clip", "torchvision", "timm", "transformers"} & set(modules.split())
