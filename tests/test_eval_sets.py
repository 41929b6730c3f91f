"""Benchmarks other than the paper's four: readers on small sets in the exact layouts, recall, zero-shot."""

import json

import numpy as np
import pytest
import torch

from dataloaders.own import read_shard_pairs, read_table_pairs
from dataloaders.registry import benchmark
from eval_files import (
    five_captions,
    write_coco,
    write_docci,
    write_flickr30k,
    write_image,
    write_imagenet,
    write_shard,
    write_table,
)
from support import evaluate, read_results, run_ranks
from training.data.sizes import count_samples
from training.eval.metrics import count_ranks, summarise
from training.main import main
from training.readers.images import load_rgb


def read(name, root, protocol="", **given):
    (found,) = benchmark(name).load(root, [protocol], **given)
    return found


def test_docci_whole_and_by_sentence(tmp_path):
    root = write_docci(tmp_path)
    whole, parts = benchmark("docci").load(root, ["docci/test", "docci/sentences"])
    numbers = [0, 1, 2, 4, 5, 6]
    assert [p.name for p in whole.image_paths] == [f"test_{n:05d}.jpg" for n in numbers]
    assert whole.captions[1] == "View 1. It has 1 trees. A 3. 5 m pole stands left"  # the rule of the long benchmarks
    assert parts.captions[:4] == ("View 0", "It has 0 trees", "A 3", "5 m pole stands left")
    assert parts.image_of_caption == tuple(i for i in range(6) for _ in range(4))
    assert whole.num_published == 5000 and all(p.is_file() for p in whole.image_paths)


def test_coco_takes_five_captions_of_the_split_and_leaves_them_as_they_are(tmp_path):
    got = read("coco", write_coco(tmp_path))
    assert [p.name for p in got.image_paths] == [f"COCO_val2014_{n:012d}.jpg" for n in range(6)]
    assert got.captions == tuple(text for n in range(6) for text in five_captions(n))
    assert got.image_of_caption == tuple(n for n in range(6) for _ in range(5))
    assert (got.key, got.num_published) == ("coco-retrieval", 25000)
    val = read("coco", tmp_path, "coco/karpathy-val")
    assert (val.key, len(val.captions)) == ("coco-val-retrieval", 5) and val.image_paths[0].name.endswith("07.jpg")


def test_coco_images_are_found_under_the_names_of_2017(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "images" / "val2014").rename(tmp_path / "train2017")
    for path in (tmp_path / "train2017").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_val2014_")))
    assert [p.name for p in read("coco", tmp_path).image_paths] == [f"{n:012d}.jpg" for n in range(6)]


def test_coco_val2017_is_another_benchmark(tmp_path):
    rows = [
        {"image_id": n, "id": 9 * k + n, "caption": text} for n in (7, 3) for k, text in enumerate(five_captions(n))
    ]
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (3, 7, 8)]  # 8 has no caption
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": rows}))
    for n in (3, 7):
        write_image(tmp_path / "images" / "val2017" / f"{n:012d}.jpg", n)
    got = read("coco", tmp_path)
    assert got.key == "coco-val2017-retrieval" and got.title == "COCO val2017"
    assert got.captions == tuple(five_captions(3) + five_captions(7)) and all(p.is_file() for p in got.image_paths)


def test_flickr30k_in_both_forms(tmp_path):
    first = read("flickr30k", write_flickr30k(tmp_path))
    assert first.captions == tuple(text for n in range(5) for text in five_captions(n)) and first.num_published == 5000
    rows = [{"image": f"flickr30k-images/{n}.jpg", "caption": five_captions(n)} for n in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    second = read("flickr30k", tmp_path, annotations=tmp_path / "list.json")
    assert (second.image_paths, second.captions) == (first.image_paths, first.captions)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": [{"filename": "a.jpg", "split": "test"}]}, "'sentences'"),
        (
            {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "x"}]}]},
            "no image of split 'test'",
        ),
        ([{"image": "a.jpg", "caption": "one text"}], "list of texts under 'caption'"),
        ({"annotations": [{"image_id": 1, "caption": "x"}], "images": []}, "image_id 1"),
        ({"rows": []}, "expected Karpathy's"),
    ],
)
def test_broken_lists_of_captions_are_named(content, said, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read("flickr30k", tmp_path, annotations=tmp_path / "list.json")
    assert "list.json" in str(error.value)


def test_own_pairs_of_a_table(tmp_path):
    got = read_table_pairs(write_table(tmp_path / "mine.csv"), "filepath", ["caption"], "raw")
    assert (got.key, len(got.image_paths)) == ("mine-retrieval", 4) and all(p.is_file() for p in got.image_paths)
    assert got.captions[3] == 'Line 1,\nwith "quotes" and 2.5 of 1' and got.image_of_caption == (0, 0, 1, 1, 2, 2, 3, 3)
    long = read_table_pairs(tmp_path / "mine.csv", "filepath", ["caption"], "long")
    assert long.captions[3] == 'Line 1,. with "quotes" and 2. 5 of 1'
    with pytest.raises(ValueError, match="filepath, caption, note"):
        read_table_pairs(tmp_path / "mine.csv", "image", ["caption"], "raw")
    (tmp_path / "mine.csv").write_text("filepath,caption\na.jpg,x\nb.jpg,\n")
    with pytest.raises(ValueError, match="row 2 lacks"):
        read_table_pairs(tmp_path / "mine.csv", "filepath", ["caption"], "raw")


def test_an_absolute_and_a_relative_path_are_one_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(f"filepath,caption\n{tmp_path}/a.jpg,one\na.jpg,two\n./a.jpg,three\nb.jpg,four\n")
    got = read_table_pairs("t.csv")
    assert got.image_of_caption == (0, 0, 0, 1) and got.captions == ("one", "two", "three", "four")


def test_own_pairs_of_parquet_may_hold_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"filepath": ["a.jpg", "b.jpg"], "caption": [["one", "two"], ["three"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    got = read_table_pairs(tmp_path / "p.parquet", "filepath", ["caption"], "raw")
    assert got.captions == ("one", "two", "three") and got.image_of_caption == (0, 0, 1)


def test_two_sets_of_one_name_exit_2(tmp_path, capsys):
    table = write_table(tmp_path / "mine" / "mine.csv")
    write_shard(tmp_path / "mine" / "000.tar")
    argv = ["--retrieval-csv", str(table), "--retrieval-wds", str(tmp_path / "mine"), "--logs", str(tmp_path)]
    assert main([*argv, "--device", "cpu"]) == 2
    assert "two data sets are called mine" in capsys.readouterr().err


def test_own_pairs_of_shards_are_read_in_place(tmp_path):
    write_shard(tmp_path / "mine" / "000.tar")
    got = read_shard_pairs(str(tmp_path / "mine" / "{000..000}.tar"), ["caption"], "raw")
    assert got.captions == ("Text of 0.", "First of 1.", "Second.", "Text of 2.", "First of 3.", "Second.")
    assert got.image_of_caption == (0, 1, 1, 2, 3, 3) and got.key == "mine-retrieval"
    expected = load_rgb(write_image(tmp_path / "2.jpg", 2))
    assert load_rgb(got.image_paths[2]).tobytes() == expected.tobytes()
    with pytest.raises(FileNotFoundError, match="001.tar"):
        read_shard_pairs(str(tmp_path / "mine" / "{000..001}.tar"), ["caption"], "raw")


@pytest.mark.parametrize("content", [b"", bytes(1024)])
def test_a_shard_without_samples_is_named(content, tmp_path, caplog):
    write_shard(tmp_path / "mine" / "000.tar")
    (tmp_path / "mine" / "001.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"001.tar: no sample in its {len(content):,} bytes"):
        read_shard_pairs(str(tmp_path / "mine"), ["caption"], "raw")
    assert count_samples([str(tmp_path / "mine" / name) for name in ("000.tar", "001.tar")]) == [4, 0]
    assert f"{tmp_path / 'mine' / '001.tar'}: no sample in it" in caplog.text


def multi_caption_features(num_images=40, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(num_images, dim))
    owner = np.repeat(np.arange(num_images), rng.integers(1, 7, num_images))
    texts = images[owner] + 1.2 * rng.normal(size=(len(owner), dim))
    unit = [torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True)).float() for x in (images, texts)]
    return *unit, torch.tensor(owner)


@pytest.mark.parametrize("seed", range(3))
def test_multi_caption_recall_by_brute_force(seed):
    images, texts, owner = multi_caption_features(seed=seed)
    i2t, t2i = count_ranks(images, texts, owner, tile=(7, 5))
    score = images.double().numpy() @ texts.double().numpy().T
    for k in (1, 5, 10):
        hits = [any(owner[j] == i for j in np.argsort(-row)[:k]) for i, row in enumerate(score)]
        assert summarise(i2t)[f"top{k}"] == pytest.approx(np.mean(hits))
        hits = [owner[j] in np.argsort(-column)[:k] for j, column in enumerate(score.T)]
        assert summarise(t2i)[f"top{k}"] == pytest.approx(np.mean(hits))


def test_multi_caption_recall_equals_clip_benchmark():
    from clip_benchmark.metrics import zeroshot_retrieval

    images, texts, owner = multi_caption_features(num_images=60, seed=7)
    own_texts = [[j for j in range(len(owner)) if owner[j] == i] for i in range(len(images))]

    class Recorded:  # clip_benchmark needs a model: this one returns recorded features
        def encode_image(self, numbers):
            return images[numbers]

        def encode_text(self, numbers):
            return texts[numbers]

    batches = [(torch.arange(s, s + 20), own_texts[s : s + 20]) for s in range(0, 60, 20)]
    expected = zeroshot_retrieval.evaluate(
        Recorded(), batches, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    i2t, t2i = count_ranks(images, texts, owner)
    for k in (1, 5, 10):
        assert summarise(t2i)[f"top{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"])
        assert summarise(i2t)[f"top{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"])


def test_all_from_the_command_line_and_in_two_processes(tmp_path, tiny_clip, capsys):
    flags = ["--docci-retrieval", write_docci(tmp_path / "docci")]
    flags += ["--protocol", "docci/test,docci/sentences"]
    flags += ["--coco-retrieval", write_coco(tmp_path / "coco")]
    flags += ["--flickr30k-retrieval", write_flickr30k(tmp_path / "flickr")]
    flags += ["--retrieval-csv", write_table(tmp_path / "t" / "mine.csv")]
    write_shard(tmp_path / "w" / "000.tar")
    flags += ["--retrieval-wds", tmp_path / "w", "--batch-size", 7]
    record = evaluate(tmp_path, tiny_clip, *flags)
    out = capsys.readouterr().out
    assert "DOCCI sentences" in out and "30 of 25,000" in out and "8" in out
    assert record["coco-retrieval-num-pairs"] == 30 and record["w-retrieval-num-pairs"] == 6
    common = ["--model", tiny_clip, "--logs", str(tmp_path / "logs"), "--name", "two", "--workers", "0"]
    done = run_ranks([*map(str, flags), *common, "--device", "cpu"], 2)
    assert done.returncode == 0, done.stderr
    again = read_results(tmp_path / "logs", "two")
    assert {k: v for k, v in again.items() if "retrieval-" in k} == {
        k: v for k, v in record.items() if "retrieval-" in k
    }


def test_missing_images_of_several_captions_count_as_pairs(tmp_path, tiny_clip, capsys):
    coco = write_coco(tmp_path / "coco")
    (coco / "images" / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    record = evaluate(tmp_path, tiny_clip, "--coco-retrieval", coco, "--allow-missing")
    assert record["coco-retrieval-num-pairs"] == 25 and record["coco-retrieval-num-missing"] == 5
    assert capsys.readouterr().out.count("000000000002.jpg") == 1


def test_features_of_shards_are_cached_too(tmp_path, tiny_clip, monkeypatch):
    write_shard(tmp_path / "w" / "000.tar")
    flags = ["--retrieval-wds", tmp_path / "w", "--feature-cache", tmp_path / "cache"]
    first = evaluate(tmp_path, tiny_clip, *flags)
    kept = len(list((tmp_path / "cache").iterdir()))
    for mode in ("fast", "scaled"):  # other pixels need other features; captions are unchanged
        record = evaluate(tmp_path, tiny_clip, *flags, "--image-decoding", mode)
        kept += 1
        assert len(list((tmp_path / "cache").iterdir())) == kept and record["flags"]["image_decoding"] == mode
    monkeypatch.setattr("training.eval.encode.Encoder._encode", None)  # a second run must not encode
    second = evaluate(tmp_path, tiny_clip, *flags)
    assert {k: v for k, v in first.items() if "retrieval-" in k} == {
        k: v for k, v in second.items() if "retrieval-" in k
    }


def test_a_dry_run_says_complete_or_what_is_missing(tmp_path, capsys):
    common = ["--dry-run", "--model", "lotlip_tiny", "--device", "cpu", "--logs", str(tmp_path / "logs")]
    found = {
        "--flickr30k-retrieval": (
            write_flickr30k(tmp_path / "flickr"),
            "no image is missing, but only 25 of 5,000 pairs",
        ),
        "--retrieval-csv": (write_table(tmp_path / "t" / "mine.csv"), "mine: complete, 8 pairs"),
        "--docci-retrieval": (write_docci(tmp_path / "d"), "no image is missing, but only 6 of 5,000 pairs listed"),
        "--imagenet-val": (write_imagenet(tmp_path / "v"), "of 50,000 images"),
    }
    assert main([*common, *(str(word) for flag, (root, _) in found.items() for word in (flag, root))]) == 0
    said = capsys.readouterr().out
    assert all(line in said for _, line in found.values()), said
