"""Published numbers: found by weights, name or the user's own file, and compared in units of the interval."""

import json
from pathlib import Path

import pytest

from dataloaders.registry import benchmark, benchmarks
from eval_files import write_docci, write_image
from support import evaluate
from training.eval.published import PublishedNumber, compare_with_published, find_published, read_published
from training.eval.record import Recall, RetrievalResult
from training.main import main


def urban(root: Path) -> Path:
    for number in range(6):
        write_image(root / "image" / f"{number}.jpg", number)
        (root / "caption").mkdir(exist_ok=True)
        (root / "caption" / f"{number}.txt").write_text(f"Street {number} with {number} cars. Second sentence.")
    return root


def test_our_list_names_known_protocols_and_plausible_numbers():
    models, numbers = read_published()
    known = {protocol for benchmark in benchmarks() for protocol in benchmark.protocols}
    assert {number.protocol for number in numbers} <= known and {number.model for number in numbers} == set(models)
    assert all(0 < value < 100 for number in numbers for value in (number.i2t, number.t2i))
    assert all(number.source for number in numbers)
    assert all(len(sha) == 64 for about in models.values() for sha in about.get("weights_sha256", ()))


def test_a_model_is_found_by_its_weights_then_by_name_and_tag():
    models, _ = read_published()
    sha = models["DeBias-CLIP ViT-B/16"]["weights_sha256"][0]
    assert {n.model for n in find_published(None, "ViT-B-16", "openai", sha)} == {"DeBias-CLIP ViT-B/16"}
    assert {n.model for n in find_published(None, "ViT-B-16", "openai", "0" * 64)} == {"CLIP ViT-B/16"}
    assert {n.model for n in find_published("LoTLIP ViT-B/16", "x", None, None)} == {"LoTLIP ViT-B/16"}
    assert find_published(None, "ViT-B-16", "my/weights.pt", None) == []


def test_differences_are_counted_in_half_intervals_and_sizes_are_kept_apart():
    recall = Recall(0.6, 0.8, 0.9, (0.58, 0.62), 2.0, 1.0)
    counts = {"num_pairs": 10000, "num_expected": 10000, "num_missing": 0, "num_broken": 0, "num_images": 10000}
    texts = {"truncated_share": 0.0, "truncated_mean_tokens_lost": 0.0, "protocol": "sv/sam", "fingerprint": "0" * 16}
    result = RetrievalResult("SV-10k", "share4v-retrieval-10000", **counts, **texts, i2t=recall, t2i=recall)
    printed = [
        PublishedNumber("m", "sv/sam", 55.0, 61.0, "s", pairs=10000),
        PublishedNumber("m", "sv/sam", 1.0, 1.0, "s", pairs=1000),
    ]
    found = compare_with_published([result], printed)
    assert [(c["direction"], round(c["difference"], 6), round(c["half_intervals"], 6)) for c in found] == [
        ("i2t", 0.05, 2.5),
        ("t2i", -0.01, -0.5),
    ]


def test_a_planted_number_is_found_and_compared(tmp_path, tiny_clip, capsys, monkeypatch):
    root = urban(tmp_path / "Urban1k")
    monkeypatch.setitem(benchmark("urban1k").protocols, "urban1k/first-line", {6: ()})
    sha = evaluate(tmp_path, tiny_clip, "--urban1k-retrieval", root, name="first")["weights_sha256"]
    own = {"model": "ours", "i2t": 97.5, "t2i": 0.5, "source": "a <b>paper</b>"}
    planted = {
        "models": {"ours": {"weights_sha256": [sha]}, "other": {}},
        "numbers": [
            {**own, "protocol": "urban1k/first-line"},
            {**own, "protocol": "urban1k/raw", "i2t": 50.0},
            {**own, "protocol": "urban1k/first-line", "model": "other"},
        ],
    }
    file = tmp_path / "printed.json"
    file.write_text(json.dumps(planted))
    capsys.readouterr()
    flags = ("--urban1k-retrieval", root, "--allow-missing", "--published", file, "--report")
    result = evaluate(tmp_path, tiny_clip, *flags, name="second")
    i2t, t2i = result["published"]
    assert (i2t["direction"], i2t["model"], i2t["printed"]) == ("i2t", "ours", 0.975)
    assert i2t["difference"] == pytest.approx(result["urban1k-retrieval-i2t-top1"] - 0.975)
    low, high = result["urban1k-retrieval-i2t-top1-ci95"]
    assert i2t["half_intervals"] == pytest.approx(i2t["difference"] / ((high - low) / 2))
    said = capsys.readouterr().out
    assert "Published numbers of ours" in said and "97.50" in said and "0.50" in said
    assert "urban1k/raw 50.0 / 0.5" in said
    page = (tmp_path / "logs" / "second" / "report.html").read_text()
    assert "97.50" in page and "a &lt;b&gt;paper" in page


def test_modified_and_incomplete_lists_are_not_compared(tmp_path, tiny_clip, caplog):
    root = urban(tmp_path / "Urban1k")
    flags = ("--urban1k-retrieval", root, "--published", "LoTLIP ViT-B/16")
    assert "published" not in evaluate(tmp_path, tiny_clip, *flags)
    assert "there are no published numbers for the protocols" in caplog.text
    recall = Recall(0.6, 0.8, 0.9, (0.58, 0.62), 2.0, 1.0)
    texts = {
        "truncated_share": 0.0,
        "truncated_mean_tokens_lost": 0.0,
        "fingerprint": "0" * 16,
        "i2t": recall,
        "t2i": recall,
    }
    printed = [PublishedNumber("m", name, 55.0, 61.0, "s") for name in ("p", "p (modified)")]
    for protocol, missing, number in (("p", 0, 2), ("p", 1, 0), ("p (modified)", 0, 0)):
        counts = {"num_pairs": 9 - missing, "num_expected": 9, "num_missing": missing, "num_broken": 0, "num_images": 9}
        result = RetrievalResult("t", "k", protocol=protocol, **counts, **texts)
        assert len(compare_with_published([result], printed)) == number


def test_no_number_of_that_protocol_is_said(tmp_path, tiny_clip, capsys, caplog):
    root = write_docci(tmp_path / "docci")
    flags = ("--docci-retrieval", root, "--published", "LoTLIP ViT-B/32")
    assert "published" not in evaluate(tmp_path, tiny_clip, *flags)
    assert "there are no published numbers for the protocols" in caplog.text


@pytest.mark.parametrize(("asked", "said"), [("LoTLIP", "expected one of"), ("none.json", "no such file")])
def test_unknown_names_and_files_are_usage_errors(tmp_path, tiny_clip, asked, said, capsys):
    root = urban(tmp_path / "Urban1k")
    argv = ["--model", tiny_clip, "--urban1k-retrieval", str(root), "--published", asked, "--logs", str(tmp_path)]
    assert main([*argv, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
