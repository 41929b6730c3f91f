"""Image features of a locked tower: extracted once, equal to the tower's output, equivalent to images in training."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_train_data import good, write_shard

import training
from support import read_results, run_ranks
from training.data.features import read_features, read_index
from training.data.shards import ShardSource
from training.data.sizes import count_samples, expand_sources
from training.main import main
from training.readers.images import load_rgb
from training.readers.samples import read_samples

MODEL = ["--model", "lotlip_tiny", "--workers", "0"]
TRAINING = "--lock-image --log-every-n-steps 1 --warmup 2 --epochs 2 --num-long-captions 1 --batch-size 8".split()
WHOLE = ["--aug-cfg", "scale=1.0,1.0"]


def extract(data: Path, out: Path, *flags: str) -> int:
    return main([*MODEL, "--train-data", str(data), "--extract-image-features", str(out), *flags])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory) -> Path:
    """Writes the 40 scenes in three shards, one of which ends with a sample without an image."""
    folder = tmp_path_factory.mktemp("shards")
    samples = list(read_samples(str(scenes / "train" / "00000.tar")))
    for number, part in enumerate((samples[:25], samples[25:33], samples[33:])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in part:
                for suffix, content in sample.files.items():
                    if number == 2 and sample is part[-1] and suffix == "jpg":
                        continue
                    member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def features(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "plain"
    assert extract(shards, out, "--batch-size", "7") == 0
    return out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model, _, preprocess = training.create_model_and_transforms("lotlip_tiny", pretrained_text=False)
    return model.eval(), preprocess


def test_features_equal_the_towers_output(shards, features, model):
    tower, preprocess = model
    number = 0
    for shard in range(3):
        kept = list(read_features(str(features / f"{shard:06d}.features.parquet")))
        raw = [s for s in read_samples(str(shards / f"{shard}.tar")) if "jpg" in s.files]
        assert [(s.key, s.source) for s in kept] == [(s.key, s.source) for s in raw]
        assert [s.record for s in kept] == [json.loads(s.files["json"]) | {"txt": s.files["txt"].decode()} for s in raw]
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(s.files["jpg"]))) for s in raw])
        with torch.no_grad():
            expected = tower.encode_image(pixels, normalize=True)
        got = torch.stack([torch.tensor(s.features[0]) for s in kept])
        assert got.dtype == torch.float16 and got.shape == expected.shape
        torch.testing.assert_close(got.float(), expected, rtol=1e-3, atol=1e-4)
        assert [s.key for s in read_features(str(features / f"{shard:06d}.features.parquet"), 2, 5)] == [
            s.key for s in raw[2:5]
        ]
        number += len(kept)
    _, sources, counts = read_index(features)
    assert number == 39 and sources == ["0.tar", "1.tar", "2.tar"]
    assert counts == {"seen": 40, "skipped": {"no image": 1}}


def test_batches_without_an_image_do_not_end_the_extraction(tmp_path):
    """Neither a shard without one, nor broken samples behind the last full batch of a shard; all are counted."""
    (tmp_path / "data").mkdir()
    bad = {"jpg": b"no image"}
    write_shard(tmp_path / "data" / "0.tar", {"0": good(0), "1": good(1), "2": good(2) | bad})
    write_shard(tmp_path / "data" / "1.tar", {"3": good(3) | bad})
    assert extract(tmp_path / "data", tmp_path / "features", "--batch-size", "2") == 0
    assert read_index(tmp_path / "features")[2] == {"seen": 4, "skipped": {"broken image": 2}}
    found = [list(read_features(str(path))) for path in sorted((tmp_path / "features").glob("*.parquet"))]
    assert [[sample.key for sample in samples] for samples in found] == [["0", "1"], []]


def test_a_sample_takes_two_bytes_a_number_and_its_captions(tmp_path, features):
    path = features / "000000.features.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert column.num_values == 25 * 128 and column.total_compressed_size < 25 * 128 * 2 + 200


def test_training_on_features_equals_training_on_images(shards, features, tmp_path):
    """Uses the shards without the broken sample, so that both trainings see the same samples in the same order."""
    clean = tmp_path / "clean"
    shutil.copytree(shards, clean)
    with tarfile.open(clean / "2.tar") as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar][:-2]
    with tarfile.open(clean / "2.tar", "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    for name, data, more in (("images", clean, WHOLE), ("features", features, [])):
        argv = [*MODEL, *TRAINING, *more, "--train-data", str(data), "--logs", str(tmp_path), "--name", name]
        assert main(argv) == 0
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "images"), rel=2e-3)
    ends = [torch.load(tmp_path / n / "checkpoints" / "epoch_2.pt", weights_only=True) for n in ("images", "features")]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()


def test_a_linear_head_behind_a_locked_trunk_is_trained_on_cached_features_as_on_images(shards, tmp_path):
    """Both use batch norms as in evaluation, because features are cached with these."""
    config = tmp_path / "with_head.json"
    content = json.loads((Path(training.__file__).parent / "model/model_configs/lotlip_tiny.json").read_text())
    tower = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    config.write_text(json.dumps(content | {"vision_cfg": tower}))
    flags = ["--model", f"config:{config}", "--workers", "0"]
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir()
    shutil.copy(shards / "0.tar", data)
    assert main([*flags, "--train-data", str(data), "--extract-image-features", str(kept)]) == 0
    for name, source, more in (("images", data, ["--lock-image-freeze-bn-stats", *WHOLE]), ("features", kept, [])):
        argv = [*flags, *TRAINING, *more, "--train-data", str(source), "--logs", str(tmp_path), "--name", name]
        assert main(argv) == 0
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "images"), rel=2e-3)
    ends = [tmp_path / n / "checkpoints" / "epoch_2.pt" for n in ("images", "features")]
    heads = [torch.load(end, weights_only=True)["state_dict"]["visual.head.proj.weight"] for end in ends]
    assert torch.nn.functional.cosine_similarity(*[head.flatten() for head in heads], dim=0) > 0.999
    torch.manual_seed(0)
    untrained = training.create_model(f"config:{config}").visual.head.proj.weight
    assert (heads[1] - untrained).abs().max() > 1e-4
    # An evaluation with --feature-cache stores the trunk's features, so that models with other heads share them.
    results = {}
    for number, (end, cached) in enumerate([(ends[0], True), (ends[1], True), (ends[1], False)]):
        argv = [*flags, "--pretrained", str(end), "--retrieval-wds", str(data), "--logs", str(tmp_path / "eval")]
        argv += ["--retrieval-caption-keys", "long_caption", "--name", str(number)]
        assert main([*argv, *(["--feature-cache", str(tmp_path / "cache")] if cached else [])]) == 0
        results[number] = {k: v for k, v in read_results(tmp_path / "eval", str(number)).items() if "top" in k}
    assert results[1] == results[2] and results[1]
    assert len(list((tmp_path / "cache").glob("*/features.safetensors"))) == 3  # one trunk, two text towers


def test_features_do_not_train_a_head_that_they_bypass(shards, tmp_path, capsys):
    config = tmp_path / "mlp.json"
    content = json.loads((Path(training.__file__).parent / "model/model_configs/lotlip_tiny.json").read_text())
    tower = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 64}
    config.write_text(json.dumps(content | {"vision_cfg": tower}))
    flags = ["--model", f"config:{config}", "--workers", "0", "--logs", str(tmp_path)]
    assert main([*flags, "--train-data", str(shards), "--extract-image-features", str(tmp_path / "kept")]) == 0
    assert main([*flags, *TRAINING, "--train-data", str(tmp_path / "kept")]) == 2
    assert '"timm_proj": "linear"' in capsys.readouterr().err


def test_an_extraction_continues_where_it_stopped_on_any_number_of_processes(shards, features, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(features, out)
    (out / "000001.features.parquet").unlink()
    before = (out / "000000.features.parquet").stat().st_mtime_ns
    argv = [*MODEL, "--train-data", str(shards), "--extract-image-features", str(out), "--workers", "1"]
    done = run_ranks(argv, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "000000.features.parquet").stat().st_mtime_ns == before
    for number in range(3):
        ours, theirs = (list(read_features(str(f / f"{number:06d}.features.parquet"))) for f in (out, features))
        assert [s.key for s in ours] == [s.key for s in theirs]
        for a, b in zip(ours, theirs):  # rounding depends on the batches
            torch.testing.assert_close(torch.tensor(a.features), torch.tensor(b.features), rtol=2e-3, atol=1e-4)
    assert read_index(out) == read_index(features)


def test_augmented_views_are_drawn_in_turn(shards, tmp_path):
    out = tmp_path / "views"
    assert extract(shards, out, "--feature-views", "3", "--aug-cfg", "scale=0.3,1.0") == 0
    sample = next(read_features(str(out / "000000.features.parquet")))
    views = torch.tensor(sample.features)
    assert views.shape[0] == 3 and len({tuple(view.tolist()) for view in views}) == 3
    argv = [*MODEL, *TRAINING, "--train-data", str(out), "--logs", str(tmp_path), "--name", "run"]
    assert main(argv) == 0
    assert extract(shards, tmp_path / "again", "--feature-views", "3", "--aug-cfg", "scale=0.3,1.0") == 0
    again = next(read_features(str(tmp_path / "again" / "000000.features.parquet")))
    assert (again.features == sample.features).all()


def test_a_table_of_images_is_extracted_too(scenes, tmp_path):
    photos = sorted((scenes / "urban1k" / "image").glob("*.jpg"))[:5]
    table = pa.table({"filepath": [str(p) for p in photos], "caption": [f"picture {n}" for n in range(5)]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert extract(tmp_path / "t.parquet", tmp_path / "out", "--captions", "raw") == 0
    urls = expand_sources(str(tmp_path / "out"))[0]
    samples = list(ShardSource(urls, count_samples(urls), seed=0).read(0, 0, 5))
    assert sorted(s.record["caption"] for s in samples) == [f"picture {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train-data", "{features}"], "features of a locked image tower; add --lock-image"),
        (["--train-data", "{features}", *TRAINING, "--seed", "1"], "another image tower (tower differ)"),
        (["--train-data", "{features}::{shards}", *TRAINING], "some sources are image features, others are images"),
        (["--train-data", "{cut}", *TRAINING], "1 of 3 feature files are missing"),
        (
            ["--train-data", "{shards}", "--extract-image-features", "{features}", "--seed", "1"],
            "contains other features",
        ),
        (["--train-data", "{shards}", "--extract-image-features", "{shards}"], "is not empty"),
        (
            ["--train-data", "{features}", "--extract-image-features", "{here}/x"],
            "contains image features; give images",
        ),
        (["--train-data", "{shards}", "--feature-views", "2"], "without --extract-image-features"),
    ],
)
def test_features_that_do_not_fit_are_refused(flags, said, shards, features, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(features, cut)
    (cut / "000001.features.parquet").unlink()
    places = {"features": features, "shards": shards, "cut": cut, "here": tmp_path}
    argv = [*MODEL, "--logs", str(tmp_path / "logs"), *(word.format(**places) for word in flags)]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and said in message and "Traceback" not in message


def evaluate(scenes: Path, model: str, logs: Path, name: str, cache: Path) -> dict:
    argv = ["--model", model, "--workers", "0", "--logs", str(logs), "--name", name, "--feature-cache", str(cache)]
    assert main([*argv, "--urban1k-retrieval", str(scenes / "urban1k")]) == 0
    return {k: v for k, v in read_results(logs, name).items() if k.startswith("urban1k")}


def test_cached_features_give_the_same_evaluation_without_the_tower(scenes, tiny_clip, tmp_path, monkeypatch):
    data = tmp_path / "set"
    shutil.copytree(scenes / "urban1k", data / "urban1k")
    plain = evaluate(data, tiny_clip, tmp_path, "first", tmp_path / "cache")
    from open_clip.transformer import VisionTransformer

    original, asked = VisionTransformer.forward_intermediates, []
    counting = lambda self, x, *args, **kwargs: asked.append(len(x)) or original(self, x, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(VisionTransformer, "forward_intermediates", counting)
    probe = [1]  # the image by which a tower is recognised
    with monkeypatch.context() as patch:
        patch.setattr("training.eval.encode.Encoder._encode", None)
        assert evaluate(data, tiny_clip, tmp_path, "second", tmp_path / "cache") == plain
    assert asked == probe
    # An image that has changed is encoded again, and nothing else.
    changed = sorted((data / "urban1k" / "image").glob("*.jpg"))[3]
    load_rgb(changed).rotate(90).save(changed)
    third = evaluate(data, tiny_clip, tmp_path, "third", tmp_path / "cache")
    assert asked == [*probe, *probe, 1]
    assert third == evaluate(data, tiny_clip, tmp_path, "fourth", tmp_path / "other cache")


def test_other_weights_never_use_cached_features(scenes, tiny_clip, tmp_path):
    first = evaluate(scenes, tiny_clip, tmp_path, "first", tmp_path / "cache")
    folder = tmp_path / "other"
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), folder)
    state = torch.load(folder / "open_clip_model.pt", weights_only=True)
    state["visual.proj"] = state["visual.proj"].roll(1, 0)
    torch.save(state, folder / "open_clip_model.pt")
    other = evaluate(scenes, f"local-dir:{folder}", tmp_path, "second", tmp_path / "cache")
    assert other == evaluate(scenes, f"local-dir:{folder}", tmp_path, "third", tmp_path / "cache 2") and other != first
    # three towers: two image towers, one text tower
    assert len(list((tmp_path / "cache").glob("*/features.safetensors"))) == 3
