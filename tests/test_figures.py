"""Figures are drawn from recorded results, and only from these."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.model.towers.corner import prefix_attention

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path):
    """A checkout's scripts and recorded results, without the images."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "figures.py", tmp_path / "scripts")
    printed = Path("src") / "training" / "eval" / "published.json"
    (tmp_path / printed.parent).mkdir(parents=True)
    shutil.copy(ROOT / printed, tmp_path / printed)
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=shutil.ignore_patterns("*.png", "lengths.json"))
    return tmp_path


def draw(tree, *words):
    done = subprocess.run([sys.executable, "scripts/figures.py", *words], cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_figures_are_drawn_from_the_records(tree):
    code, out, err = draw(tree)
    assert code == 0, err
    assert "lengths.png: nothing recorded" in out and not (tree / "figures" / "lengths.png").exists()
    assert Image.open(tree / "figures" / "published.png").width > 800
    first = (tree / "figures" / "published.png").read_bytes()
    assert draw(tree)[0] == 0 and (tree / "figures" / "published.png").read_bytes() == first


def test_the_published_table_is_the_readmes(tree):
    """The README contains the table exactly; the table contains LoTLIP's numbers and current results."""
    printed = draw(tree, "--table")[1].strip()
    assert printed in (ROOT / "README.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in printed.splitlines()[2:]}
    assert {f"CLIP ViT-B/{n}" for n in (16, 32)} | {f"LoTLIP ViT-B/{n}" for n in (16, 32)} <= rows.keys()
    assert "Long-CLIP ViT-B/16" in rows and not any("L/14" in name for name in rows)
    assert "93.1 / 93.0" in rows["DeBias-CLIP ViT-B/16"] and "2026" in rows["DeBias-CLIP ViT-B/16"]
    first = json.loads((tree / "src" / "training" / "eval" / "published.json").read_text())["numbers"][0]
    assert f"{first['i2t']:.1f} / {first['t2i']:.1f}" in rows[first["model"]]


def test_whole_benchmarks_and_lengths_are_recorded_partial_ones_are_not(tree):
    def result(num_pairs):
        numbers = {f"dci-retrieval-{d}-top1": 0.5 for d in ("i2t", "t2i")}
        return numbers | {"dci-retrieval-num-pairs": num_pairs, "dci-retrieval-num-expected": 7805, "model": "x"}

    run = tree / "logs" / "r" / "checkpoints"
    run.mkdir(parents=True)
    (run / "results.jsonl").write_text(json.dumps(result(7000)) + "\n")
    code, _, err = draw(tree, "--record", "logs/r")
    assert code == 2 and "neither a complete DCI" in err
    tokens = {str(n): {"i2t": n / 200, "t2i": n / 200} for n in (10, 20, 77)}
    lengths = {
        "context_length": 77,
        "sets": {"DCI": {"tokens": tokens}},
        "effective_length": {"DCI": 74.0, "all": 74.0},
    }
    (run / "results.jsonl").write_text(json.dumps(result(7805) | {"lengths": lengths}) + "\n")
    code, out, err = draw(tree, "--record", "logs/r", "--as", "our B/16")
    assert code == 0 and "figures/lengths.png\n" in out, err
    assert json.loads((tree / "figures" / "ours.json").read_text())["models"]["our B/16"]["recall"] == {
        "DCI": [50.0, 50.0]
    }
    assert draw(tree, "--record-demo", "nowhere")[0] == 2


def test_the_method_figure_shows_the_attention_that_the_model_computes(tmp_path):
    spec = importlib.util.spec_from_file_location("method_figure", ROOT / "scripts" / "method_figure.py")
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    drawn = [[figure.may_attend(q, k) for k in range(len(figure.TOKENS))] for q in range(len(figure.TOKENS))]
    keep = torch.ones(1, len(figure.TOKENS), dtype=torch.bool)
    assert drawn == prefix_attention(keep, figure.NUM_CORNERS)[0].tolist()
    outs = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for out in outs:
        subprocess.run([sys.executable, ROOT / "scripts" / "method_figure.py", out], check=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
