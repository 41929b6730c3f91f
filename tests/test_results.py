"""training.results.load: results of runs as one table, against their own lines; compare names differing flags."""

import json

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES

from eval_files import write_coco, write_docci, write_imagenet
from support import evaluate
from training import compare, results
from training.eval.record import ClassificationResult, Recall, RetrievalResult, result_rows, to_json


@pytest.fixture(scope="module")
def logs(tmp_path_factory, tiny_clip):
    folder = tmp_path_factory.mktemp("runs")
    docci, coco, val = write_docci(folder / "docci_data"), write_coco(folder / "coco"), write_imagenet(folder / "val")
    both = [
        "--docci-retrieval",
        docci,
        "--protocol",
        "docci/test,docci/sentences",
        "--coco-retrieval",
        coco,
        "--allow-missing",
    ]
    prompts = folder / "prompts.json"  # one text for each class instead of 80
    prompts.write_text(json.dumps({"imagenet1k": {name: [name] for name in dict.fromkeys(IMAGENET_CLASSNAMES)}}))
    evaluate(folder, tiny_clip, *both, name="one")
    evaluate(
        folder, tiny_clip, *both, "--imagenet-val", val, "--imagenet-prompts", prompts, "--batch-size", 7, name="two"
    )
    evaluate(folder, tiny_clip, *both, "--batch-size", 5, name="two")
    return folder / "logs"


def test_tables_are_made_from_rows_of_the_data_frame(logs):
    table = results.load(logs / "one")
    rows = result_rows(table.to_dict("records"))
    for (_, read), row in zip(table.iterrows(), rows):
        assert row["benchmark"] == read["benchmark"] and row["T2I\nR@5"] == f"{100 * read['t2i-top5']:.2f}"
        assert row["I2T rank\nmedian / mean"].endswith(f"/ {read['i2t-mean-rank']:.1f}")
    assert len(rows) == 3


def test_a_row_per_evaluation_and_benchmark(logs):
    table = results.load(logs)
    lines = [
        json.loads(text)
        for run in ("one", "two")
        for text in (logs / run / "checkpoints" / "results.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3 and len(table) == 3 + 4 + 3
    assert table["run"].tolist() == [str(logs / "one")] * 3 + [str(logs / "two")] * 7
    whole = table[table["key"] == "docci-retrieval"]
    assert whole["t2i-top1"].tolist() == [line["docci-retrieval-t2i-top1"] for line in lines]
    assert whole["--batch-size"].tolist() == [line["flags"]["batch_size"] for line in lines]
    parts = table[table["benchmark"] == "DOCCI sentences"]
    assert parts["num-pairs"].tolist() == [line["docci-sentences-retrieval-num-pairs"] for line in lines]
    assert set(parts["protocol"]) == {"docci/sentences (modified)"}
    assert set(whole["protocol"]) == {"docci/test (modified)"}
    (imagenet,) = table[table["key"] == "imagenet-zeroshot-val"]["top5"]
    assert imagenet == lines[1]["imagenet-zeroshot-val-top5"]
    classified = table[table["key"] == "imagenet-zeroshot-val"].dropna(axis="columns")
    (row,) = result_rows(classified.to_dict("records"))
    assert row["images"] == "9 of 50,000" and row["top-5"] == f"{100 * imagenet:.2f}"
    assert table.groupby("benchmark")["i2t-top1"].mean()["COCO"] == pytest.approx(
        np.mean([line["coco-retrieval-i2t-top1"] for line in lines])
    )
    assert len(results.load(logs / "two", last=True)) == 3


def test_compare_names_the_flags_that_differ(logs, capsys):
    assert compare.main([str(logs / "one"), str(logs / "two")]) == 0
    said = capsys.readouterr().out
    assert "Flags that differ:" in said and "--batch-size" in said and "--workers" not in said.split("Flags that")[1]


def test_missing_results_are_an_error_and_broken_lines_are_read_past(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="evaluate a model"):
        results.load(tmp_path)
    path = tmp_path / "run" / "checkpoints" / "results.jsonl"
    path.parent.mkdir(parents=True)
    line = json.dumps({"model": "m\u2028\u2028", "k-i2t-top1": 0.5}, ensure_ascii=False)  # U+2028 ends no line
    path.write_text(f'{line}\n{{"b":\n[1]\n{line}\n')
    table = results.load(tmp_path)
    assert table["i2t-top1"].tolist() == [0.5, 0.5] and set(table["model"]) == {"m\u2028\u2028"}
    assert "results.jsonl line 2: skipped, broken JSON" in caplog.text


def test_json_keys_are_the_published_ones():
    recall = Recall(0.5, 0.75, 1.0, (0.4, 0.6), 1.5, 1.0)
    counts = {"num_pairs": 9, "num_expected": 10, "num_missing": 1, "num_broken": 0}
    texts = {"truncated_share": None, "truncated_mean_tokens_lost": None, "protocol": "p", "fingerprint": "f"}
    one = RetrievalResult("T", "k", **counts, num_images=9, **texts, i2t=recall, t2i=recall)
    two = ClassificationResult("Z", "z", **counts, top1=0.1, top5=0.2, top1_ci95=(0.0, 0.3))
    flat = to_json([one, two])
    names = "top1 top5 top10 top1-ci95 mean-rank median-rank".split()
    wanted = {f"k-{d}-{name}" for d in ("i2t", "t2i") for name in names}
    wanted |= {f"k-num-{n}" for n in ("images", "pairs", "expected", "missing", "broken")}
    wanted |= {f"k-{n}" for n in "pairs title protocol fingerprint truncated-share truncated-mean-tokens-lost".split()}
    wanted |= {f"z-{n}" for n in "top1 top5 top1-ci95 title prompts images".split()}
    wanted |= {f"z-num-{n}" for n in ("images", "expected", "missing", "broken")}
    assert flat.keys() == wanted and flat["k-pairs"] == "9 of 10 pairs" and flat["z-images"] == "9 of 10 images"
