"""Recall with captions cut, shuffled or with sentences dropped, against texts cut by hand; and the effective length."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import training
from support import read_results, run_ranks
from training.eval.changes import cut_tokenizer, drop_sentence, list_changes, shuffle_sentences
from training.eval.lengths import effective_length
from training.flags.parser import parse_args
from training.main import main
from training.readers.captions import split_caption


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Writes 30 images with captions of one to eight sentences."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "caption").mkdir()
    (root / "image").mkdir()
    rng = np.random.default_rng(0)
    words = ["red", "blue", "small", "dog", "tree", "house", "on", "the", "left", "walks"]
    for n in range(30):
        text = " ".join(" ".join(rng.choice(words, 9)) + "." for _ in range(1 + n % 8))
        (root / "caption" / f"{n}.txt").write_text(text)
        pixels = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(root / "image" / f"{n}.jpg")
    return root


FLAGS = ["--retrieval-lengths", "10,20,500", "--retrieval-sentences", "1,2", "--retrieval-sensitivity", "--report"]


@pytest.fixture(scope="module", params=["stock", "lotlip_tiny"])
def run(request, data, tiny_clip, tmp_path_factory):
    name = tiny_clip if request.param == "stock" else "lotlip_tiny"
    logs = tmp_path_factory.mktemp("logs")
    argv = ["--urban1k-retrieval", str(data), "--model", name, "--workers", "0", "--device", "cpu", *FLAGS]
    assert main([*argv, "--logs", str(logs), "--name", "r"]) == 0
    torch.manual_seed(0)  # --seed: the weights of a model without any
    model, _, preprocess = training.create_model_and_transforms(name)
    return logs / "r", read_results(logs, "r"), model.eval(), training.get_tokenizer(name), preprocess


def recall_of(model, preprocess, data, ids):
    names = [str(n) for n in range(30)]
    captions = torch.cat(ids)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(data / "image" / f"{n}.jpg")) for n in names])
        score = (
            model.encode_image(pixels, normalize=True).double() @ model.encode_text(captions, normalize=True).double().T
        )
    own = score.diag()
    hits = []
    for matrix, target in ((score, own[:, None]), (score.T, own[:, None])):
        better = (matrix > target + 1e-7).sum(1)
        tied = ((matrix - target).abs() <= 1e-7).sum(1)
        hits.append(float(((better == 0) / tied).mean()))
    return hits


def test_cut_captions_equal_tokens_cut_by_hand(run, data):
    _, record, model, tokenizer, preprocess = run
    texts = [". ".join(split_caption((data / "caption" / f"{n}.txt").read_text())) for n in range(30)]
    found = record["lengths"]["sets"]["Urban1k"]["tokens"]
    assert list(found) == ["10", "20", str(tokenizer.context_length)]
    for length in (10, 20):
        ids = []
        for row in tokenizer(texts):
            last = int((row != 0).sum())  # both pad with 0
            if last > length:
                row = torch.cat([row[: length - 1], row[last - 1 : last], torch.zeros(len(row) - length)]).long()
            ids.append(row[None])
        i2t, t2i = recall_of(model, preprocess, data, ids)
        assert found[str(length)]["i2t"] == pytest.approx(i2t) and found[str(length)]["t2i"] == pytest.approx(t2i)
    whole = found[str(tokenizer.context_length)]
    assert whole["t2i"] == record["urban1k-retrieval-t2i-top1"]


def test_first_sentences(run, data):
    _, record, model, tokenizer, preprocess = run
    texts = [split_caption((data / "caption" / f"{n}.txt").read_text()) for n in range(30)]
    found = record["lengths"]["sets"]["Urban1k"]["sentences"]
    assert list(found) == ["1", "2", "all"]
    i2t, t2i = recall_of(model, preprocess, data, [tokenizer(". ".join(own[:2])) for own in texts])
    assert found["2"] == pytest.approx({"i2t": i2t, "t2i": t2i})


def test_sensitivity_and_files(run):
    folder, record, _, tokenizer, _ = run
    found = record["lengths"]["sets"]["Urban1k"]["sensitivity"]
    assert found["as it is"]["similarity"] == pytest.approx(1)
    assert all(-1 <= found[name]["similarity"] < 1 for name in ("sentences shuffled", "one sentence dropped"))
    assert Image.open(folder / "lengths.png").width > 500
    assert "Recall with shortened captions" in (folder / "report.html").read_text()
    with open(folder / "cut_captions.csv") as file:
        rows = list(csv.DictReader(file))
    share = record["urban1k-retrieval-truncated-share"]
    assert len(rows) == round(30 * share)
    for row in rows:
        assert int(row["lost_tokens"]) > 0 and len(row["caption"].split()) > 60
    assert len(rows) > 0 or tokenizer.context_length > 77


def test_shuffling_and_dropping_change_order_and_number_alone():
    text = ["One", "Two", "Three", "Four", "Five"]
    shuffled, left = shuffle_sentences(text, 0), drop_sentence(text, 0)
    assert shuffled != text and sorted(shuffled) == sorted(text)
    assert len(left) == 4 and left == [s for s in text if s in left]
    assert shuffle_sentences(text, 0) == shuffled and any(shuffle_sentences(text, s) != shuffled for s in range(1, 5))
    assert shuffle_sentences(["One"], 0) == drop_sentence(["One"], 0) == ["One"]
    assert shuffle_sentences(["Same", "Same"], 0) == ["Same", "Same"]


def test_effective_length_is_where_95_percent_are_reached():
    assert effective_length([10, 20, 40], [0.0, 0.95, 1.0]) == pytest.approx(20)
    assert effective_length([10, 20, 40], [0.0, 0.9, 1.0]) == pytest.approx(20 + 20 / 2)
    assert effective_length([10, 20, 40], [0.5, 0.5, 0.5]) == 10  # no gain after the first ten tokens
    assert effective_length([10, 20, 40], [0.2, 0.8, 0.4]) == pytest.approx(10 + 10 * (0.76 - 0.2) / 0.6)
    assert effective_length([10, 20], [0.0, 0.0]) is None


def test_lengths_are_those_a_model_can_read(tmp_path, data, capsys):
    tokenizer = training.get_tokenizer("lotlip_tiny")  # 128 tokens, 2 corners
    assert [change.name for change in list_changes(tokenizer, (248, 40, 10))] == ["10", "40", "128"]
    assert cut_tokenizer(tokenizer, 10)(["a " * 50]).shape == (1, 10) and tokenizer.context_length == 128
    argv = ["--urban1k-retrieval", str(data), "--model", "lotlip_tiny", "--retrieval-lengths", "4,20"]
    assert main([*argv, "--logs", str(tmp_path), "--device", "cpu"]) == 2
    assert "--retrieval-lengths 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train-data", "x", "--report"], "--report: no effect in training"),
        (["--imagenet-val", "x", "--report"], "no effect without a retrieval benchmark"),
        (["--features", "x.npz", "--retrieval-lengths", "10"], "--retrieval-lengths: no effect for --features"),
        (["--features", "x.npz", "--dci-retrieval", "x"], "omit --dci-retrieval"),
        (["--protocol", "docci/sentences", "--dci-retrieval", "x"], "no effect without --docci-retrieval"),
        (["--docci-retrieval", "x", "--docci-sentences"], "is now --protocol docci/test,docci/sentences"),
        (["--coco-retrieval", "x", "--karpathy-split", "val"], "is now --protocol coco/karpathy-val"),
    ],
)
def test_flags_without_effect_exit_2(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_two_processes_find_the_same(data, tiny_clip, tmp_path):

    argv = [
        "--urban1k-retrieval",
        str(data),
        "--model",
        tiny_clip,
        "--workers",
        "0",
        "--device",
        "cpu",
        "--batch-size",
        "8",
    ]
    argv += ["--retrieval-lengths", "10", "--retrieval-sensitivity", "--diagnostics", "--logs", str(tmp_path)]
    found = []
    for n in (1, 2):
        done = run_ranks([*argv, "--name", f"n{n}"], n)
        assert done.returncode == 0, done.stderr
        result = read_results(tmp_path, f"n{n}")
        found.append(json.dumps([result["lengths"], result["diagnostics"]]))
    assert found[0] == found[1]
