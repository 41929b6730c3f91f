"""Bad data that can be found before a model is built are reported then, by kind; all others are counted by kind."""

import io
import json
from collections import Counter

import pytest
from PIL import Image
from test_faults import BAD, GOOD, bomb, image_bytes, load
from test_tar import files, interleaved, pack
from test_train_data import write_shard

from training.data import sizes as sizes_module
from training.data.images import ImageReader
from training.data.loader import NoUsableSampleError
from training.data.shards import ShardSource
from training.main import main
from training.prepare.__main__ import main as prepare
from training.readers.images import MAX_ASPECT, BrokenImageError


def narrow(width: int, height: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 0)).save(buffer, form)
    return buffer.getvalue()


def train(tmp_path, data, capsys, *flags: str) -> str:
    """Returns the message of a training that is refused."""
    argv = [
        "--train-data",
        str(data),
        "--model",
        "lotlip_tiny",
        "--captions",
        "raw",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    assert main([*argv, "--logs", str(tmp_path / "logs"), *flags]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (
            [{"jpg": image_bytes()[:200], "txt": b"a"}] * 3,
            "none of the first 3 samples can be read: broken image (0.tar/",
        ),
        (
            [{"jpg": image_bytes(), "json": b'{"caption": {"en": "a"}}'}] * 2,
            "first 2 samples can be read: caption not text",
        ),
        ([{"txt": b"a"}, BAD["cut"][1], {"txt": b"b"}], "can be read: 1 broken JSON, 2 no image"),
        ([{"png": narrow(1, 5000, "PNG"), "txt": b"a"}] * 2, "image: 1 x 5,000 pixels"),
        ([{"png": bomb(), "txt": b"a"}] * 2, "can be read: image too large"),
    ],
)
def test_a_set_of_bad_samples_alone_is_refused_by_kind(tmp_path, capsys, samples, said):
    path = write_shard(tmp_path / "0.tar", {f"{n}": own for n, own in enumerate(samples)})
    assert said in train(tmp_path, path, capsys)
    assert not (tmp_path / "logs").exists() or not list((tmp_path / "logs").rglob("*.pt"))


def test_images_before_captions_and_images_that_are_not_there(tmp_path, capsys):
    message = train(tmp_path, interleaved(tmp_path), capsys)
    assert (
        "4 no caption, 4 no image; the files of a sample must be next to each other in the tar: tar --sort=name"
        in message
    )
    (tmp_path / "t.csv").write_text("filepath,caption\n" + "".join(f"{n}.jpg,number {n}\n" for n in range(5)))
    message = train(tmp_path, tmp_path / "t.csv", capsys)
    assert (
        "none of the first 5 samples can be read: broken image" in message and ".jpg: not a readable image" in message
    )


def test_a_loader_without_a_usable_sample_names_the_kinds(tmp_path):
    bad = [BAD["cut"][1], {"txt": b"a"}, BAD["list"][1], {"txt": b"b"}]
    path = write_shard(tmp_path / "0.tar", {f"{n}": own for n, own in enumerate(bad)})
    with pytest.raises(NoUsableSampleError, match=r"slots 0 to 4 .*\(1 JSON not an object, 1 broken JSON, 2 no image"):
        load(ShardSource([path], [4], seed=0), 2, 2)


def few(tmp_path, counted: dict[str, int]) -> None:
    for name, size in (("a.tar", 8), ("b.tar", 6)):
        pack(tmp_path / name, [member for n in range(size) for member in files(f"{n}", n)])
    (tmp_path / "sizes.json").write_text(json.dumps(counted))


@pytest.mark.parametrize("flags", [[], ["--dataset-resampled", "--train-num-samples", "8"]])
def test_sizes_that_count_too_few_are_refused(tmp_path, capsys, flags):
    few(tmp_path, {"a.tar": 8, "b.tar": 5})
    message = train(tmp_path, tmp_path, capsys, *flags)
    assert f"sizes.json: counts 5 samples in {tmp_path / 'b.tar'}, which has 6" in message


@pytest.mark.parametrize("content", ["{", "[8, 6]"])
def test_a_broken_file_of_sizes_is_named(tmp_path, capsys, content):
    few(tmp_path, {})
    (tmp_path / "sizes.json").write_text(content)
    assert f'{tmp_path / "sizes.json"}: expected {{"00000.tar": 10000, ..}}' in train(tmp_path, tmp_path, capsys)


def test_sizes_that_count_too_few_are_reported_where_shards_are_too_large_to_count(
    tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(sizes_module, "MAX_CHECKED_BYTES", 0)
    few(tmp_path, {"a.tar": 3, "b.tar": 6})
    urls = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    sizes = sizes_module.count_samples(urls)
    assert sizes == [3, 6]
    keys = [sample.key for sample in ShardSource(urls, sizes, seed=0).read(0, 0, 9)]
    assert sorted(keys) == sorted(f"{n}" for size in sizes for n in range(size))
    assert [s.key for s in ShardSource(urls, sizes, 0, lanes=1, factors=[1, 0], num_drawn=6).read(0, 0, 6)].count(
        "2"
    ) == 2
    assert caplog.text.count("a.tar: has more than the 3 samples that sizes.json counts") == 1
    assert (
        prepare(["inspect", str(tmp_path), "--out", str(tmp_path / "o"), "--model", "lotlip_tiny", "--workers", "1"])
        == 0
    )
    assert f"wrong for 1 shards: 8 in {urls[0]}, where it counts 3" in capsys.readouterr().out
    report = json.loads((tmp_path / "o" / "inspect.json").read_text())
    assert report["samples"] == report["usable"] == 14
    assert report["miscounted"] == {urls[0]: {"sizes.json": 3, "samples": 8}}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["exact", "fast", "scaled"])
def test_an_image_that_a_resize_would_blow_up_is_refused(form, mode):
    from torchvision import transforms

    read = ImageReader(
        transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]), mode
    )
    for size in ((2, 2 * MAX_ASPECT), (2 * MAX_ASPECT, 2), (300, 200)):
        assert read(narrow(*size, form)).shape == (3, 64, 64)
    for size in ((2, 2 * MAX_ASPECT + 1), (10_000, 1), (1, 10_000)):
        with pytest.raises(BrokenImageError, match=f"{size[0]:,} x {size[1]:,} pixels"):
            read(narrow(*size, form))


def test_narrow_images_are_counted_in_training_and_named_by_evaluation(tmp_path, capsys):
    samples = {"good": GOOD, "thin": {"jpg": narrow(10_000, 1), "txt": b"a"}, "more": GOOD}
    path = write_shard(tmp_path / "0.tar", samples)
    batches = load(ShardSource([path], [3], seed=0), 1, 3)
    assert Counter(kind for b in batches for kind, _ in b.bad_samples)["image too narrow"] >= 1
    assert prepare(["inspect", path, "--out", str(tmp_path / "o"), "--model", "lotlip_tiny", "--workers", "1"]) == 0
    assert json.loads((tmp_path / "o" / "inspect.json").read_text())["bad"] == {"image too narrow": 1}
    argv = ["--retrieval-wds", path, "--model", "lotlip_tiny", "--device", "cpu", "--logs", str(tmp_path / "logs")]
    assert main([*argv, "--workers", "0"]) != 0
    assert "0.tar/thin.jpg: 10,000 x 1 pixels" in capsys.readouterr().err
