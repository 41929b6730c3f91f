"""Commands start fast: they import only what they need, and without garbage collection."""

import os
import subprocess
import sys

import pytest

CODE = """
import gc, os, sys
from training.runtime.startup import first_imports
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
{before}
with first_imports():
    import training.eval.run, training.train.run
    during = len(collected)
print(during == 0, gc.isenabled(), gc.get_freeze_count() > 10_000, os.environ.get("OMP_WAIT_POLICY"))
print(*sys.modules)
"""
HEAVY = set("pandas sklearn matplotlib tensorboard torch.utils.tensorboard wandb duckdb polars datasets".split())


@pytest.fixture(scope="module")
def open_clips_own() -> set[str]:
    """Heavy packages that open_clip imports by itself: transformers 5.4 imports scikit-learn if it is installed."""
    code = "import open_clip, sys; print(*sys.modules)"
    return HEAVY & set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", "True True True PASSIVE"),
        ("gc.disable()", "True False False None"),
        ("os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'", "True True True ACTIVE"),
    ],
    ids=["fresh", "the caller's own setting is kept", "the user's threads spin"],
)
def test_imports_are_few_and_run_without_garbage_collection(before, found, open_clips_own):
    code = CODE.format(before=before)
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    state, modules = done.stdout.splitlines()
    assert state == found
    assert HEAVY & set(modules.split()) == open_clips_own
