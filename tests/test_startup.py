"""Commands start fast: they import only what they need, and without garbage collection."""

import subprocess
import sys

import pytest

CODE = """
import gc, sys
from training.runtime.startup import first_imports
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
{before}
with first_imports():
    import training.eval.run, training.train.run
    during = len(collected)
print(during == 0, gc.isenabled(), gc.get_freeze_count() > 10_000)
heavy = "pandas sklearn matplotlib tensorboard torch.utils.tensorboard wandb duckdb polars datasets".split()
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("before", "found"),
    [("", "True True True"), ("gc.disable()", "True False False")],
    ids=["fresh", "the caller's own setting is kept"],
)
def test_imports_are_few_and_run_without_garbage_collection(before, found):
    code = CODE.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [found, "[]"]
