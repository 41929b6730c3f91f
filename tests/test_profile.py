"""--profile records the operations of a step; counted FLOPs equal the formula for a transformer."""

import gzip
import json
import re

import pytest
import torch
from conftest import TINY_CLIP
from test_safety import command

import training
from training.main import main
from training.train.profile import ModelFlops, StepProfile, count_flops, peak_of


def test_profile_writes_a_trace_of_five_steps_and_a_table(scenes, tmp_path):
    folder = tmp_path / "profile"
    assert main(command(scenes, tmp_path, "run", "--profile", str(folder))) == 0
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    for part in ("wait for data", "forward", "loss", "backward", "update"):
        assert names.count(part) == 5, part
    table = (folder / "table.txt").read_text()
    rows = table.split("Self CPU %")[1].split("-" * 20)
    # Which operations are among the ten longest operations of so small a model differs between runs.
    assert re.search(r"aten::\w+ ", table) and "Self CPU time total" in table
    assert 10 <= sum("%" in line for line in "".join(rows).splitlines()) <= 11
    assert table in (tmp_path / "run" / "out.log").read_text()
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "table.txt"}


def test_a_run_without_enough_steps_says_that_nothing_is_recorded(tmp_path, caplog):
    with StepProfile(tmp_path, torch.device("cpu")) as profile:
        for _ in range(3):
            profile.step()
    assert "ended before step 11" in caplog.text and not list(tmp_path.iterdir())


def transformer(width: int, layers: int, tokens: int) -> int:
    """Returns forward FLOPs: 12 width^2 multiply-adds per token and layer, and attention's two products."""
    return 2 * layers * (12 * width**2 * tokens + 2 * tokens**2 * width)


def test_flops_are_those_of_the_formula(tiny_clip):
    vision, text, dim = TINY_CLIP["vision_cfg"], TINY_CLIP["text_cfg"], TINY_CLIP["embed_dim"]
    patches, length = (vision["image_size"] // vision["patch_size"]) ** 2, text["context_length"]
    embed = 2 * patches * 3 * vision["patch_size"] ** 2 * vision["width"]
    image = transformer(vision["width"], vision["layers"], patches + 1) + 2 * vision["width"] * dim
    words = transformer(text["width"], text["layers"], length) + 2 * text["width"] * dim
    model = training.create_model(tiny_clip).eval()
    ids = training.get_tokenizer(tiny_clip)(["word " * 200])
    per_image, per_token = count_flops(model, (32, 32), ids)
    # A backward pass computes two products for each one, but no gradient of the pixels.
    assert per_image == 3 * image + 2 * embed and per_token * length == pytest.approx(3 * words)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.lock_image_tower()
    assert count_flops(model, (32, 32), ids)[0] == image + embed
    assert count_flops(model, None, ids) == (0, per_token)


def test_utilisation_is_a_share_of_the_cards_peak():
    assert peak_of("NVIDIA H100 80GB HBM3", is_16_bit=True) == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB", is_16_bit=False) == 156e12
    assert peak_of("Quadro P400", is_16_bit=True) is None
    assert ModelFlops(3e9, 2e6, 100e12).utilisation(1000, 50_000, 0.1) == pytest.approx(3.1e12 / 10e12)
