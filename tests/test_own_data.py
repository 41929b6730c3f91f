"""docs/own-data.md: its commands run on a small set; near-duplicates are on one side of a split."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_train_data import jpeg, write_shard

from support import read_results
from training.eval.compare import main as compare
from training.main import main as train
from training.prepare.__main__ import main as prepare
from training.search.__main__ import main as search

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
NUM = 24


def photo(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_photos(folder: Path, form: str = "csv") -> Path:
    """Writes photos, each with a near-duplicate that is smaller, recompressed or turned, and their table."""
    (folder / "photos").mkdir(parents=True)
    rows = []
    for number in range(NUM):
        image, copy, exif = photo(number), photo(number, (60, 40)), Image.Exif()
        image.save(folder / "photos" / f"{number}.jpg", quality=92)
        if number % 2:  # stored on its side, with the rotation in the EXIF data
            copy, exif[0x0112] = copy.transpose(Image.Transpose.ROTATE_90), 6
        copy.save(folder / "photos" / f"copy, {number}.jpg", quality=60, exif=exif)
        rows += [{"filepath": f"photos/{n}{number}.jpg", "caption": f"photo {number}"} for n in ("", "copy, ")]
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    rows.append({"filepath": "photos/broken.jpg", "caption": "broken"})
    table = folder / f"photos.{form}"
    if form == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [f'"{row["filepath"]}",{row["caption"]}' for row in rows]
        table.write_text("\n".join(["filepath,caption", *lines, ""]))
    return table


def paths(folder: Path) -> dict[str, list[str]]:
    return {
        name: pq.read_table(folder / f"{name}.parquet").column("filepath").to_pylist() for name in ("train", "test")
    }


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_near_duplicates_are_on_one_side(tmp_path, form, capsys):
    table = write_photos(tmp_path, form)
    argv = ["split", str(table), "--test", "0.25", "--out"]
    assert prepare([*argv, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert (
        f"{2 * NUM + 1} rows of {2 * NUM + 1} images: 36 rows in train.parquet, 12 in test.parquet, 1 left out" in said
    )
    assert "left out: 1 broken image; 24 images are near-duplicates of another" in said
    parts = paths(tmp_path / "a")
    sides = [{re.sub(r"\D", "", Path(path).name) for path in part} for part in parts.values()]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == NUM
    lines = table.read_text().splitlines(keepends=True)
    head, body = (lines[:1], lines[1:]) if form == "csv" else ([], lines)
    table.write_text("".join([*head, *body[::-1]]))
    assert prepare([*argv, str(tmp_path / "b")]) == 0
    assert {k: sorted(v) for k, v in paths(tmp_path / "b").items()} == {k: sorted(v) for k, v in parts.items()}
    assert prepare([*argv, str(tmp_path / "c"), "--seed", "1"]) == 0
    assert sorted(paths(tmp_path / "c")["test"]) != sorted(parts["test"])
    with pytest.raises(SystemExit):
        prepare([*argv, str(tmp_path / "a")])
    assert "made from other tables or with other flags" in capsys.readouterr().err


def test_plain_images_of_different_colours_are_different(tmp_path):
    rows = ["filepath,caption"]
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 10, 255 - 30 * number)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,colour {number}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert prepare(["split", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--test", "0.25"]) == 0
    assert [len(part) for part in paths(tmp_path / "out").values()] == [6, 2]


def test_a_folder_of_images_is_divided_and_bad_rows_are_counted(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for number in range(4):
        photo(number).save(tmp_path / "a" / f"{number}.png")
        (tmp_path / "a" / f"{number}.txt").write_text(f"photo {number}")
    assert prepare(["split", str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--test", "0.25"]) == 0
    found = paths(tmp_path / "out")
    assert sorted(found["train"] + found["test"]) == [str(tmp_path / "a" / f"{n}.png") for n in range(4)]
    (tmp_path / "t.jsonl").write_text('{"filepath": "no.png", "caption": "a"}\n{broken')
    assert prepare(["split", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "none")]) == 1
    assert "2 left out\nleft out: 1 malformed row, 1 no such file" in capsys.readouterr().out


def run_page(page: str, words_for: dict[str, str]) -> int:
    """Runs the commands of a part of the page, briefly; returns how many there are."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [words for words in commands if words[0] == "python"]
    quick = {"--batch-size": "8", "--epochs": "1", "--warmup": "1"}
    for words in commands:
        module, argv = words[2], [words_for.get(word, word) for word in words[3:] if word != ".."]
        for flag, value in quick.items():
            if flag in argv:
                argv[argv.index(flag) + 1] = value
        argv = [word.replace("epoch_5", "epoch_1") for word in argv]
        if module == "training.main":
            train_flags = ["--no-pretrained-text"] * ("--pretrained" not in argv)
            assert train([*argv, "--workers", "0", "--device", "cpu", *train_flags]) == 0
        elif module == "training.search":
            assert search([*argv, "--workers", "0", "--device", "cpu"]) == 0
        elif module == "training.compare":
            assert compare(argv) == 0
        else:
            assert prepare([*argv, *["--model", "lotlip_tiny", "--workers", "1"] * (argv[0] == "inspect")]) == 0
    return len(commands)


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text().split("## From a data set")[0]
    assert run_page(page, {"MODEL": "lotlip_tiny", "PHOTOS": "photos"}) == 6
    start, after = (read_results(tmp_path / "logs", name) for name in ("start", "after"))
    assert start["test-retrieval-fingerprint"] == after["test-retrieval-fingerprint"]
    assert (tmp_path / "results.html").stat().st_size and "Index: 48 images" in capsys.readouterr().out


def test_a_hub_data_set_takes_the_place_of_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(12):
        buffer = io.BytesIO()
        photo(number).save(buffer, "JPEG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption": f"photo {number}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    words = {"MODEL": "lotlip_tiny", "photos.csv": f"hf:{tmp_path / 'hub'}:train"}
    assert run_page(PAGE.read_text().split("## 4.")[0], words) == 3
    assert "12 rows of 12 images: 11 rows in train.parquet, 1 in test.parquet" in capsys.readouterr().out
    assert "test-retrieval-fingerprint" in read_results(tmp_path / "logs", "start")


def test_the_commands_for_object_storage_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for shard in range(2):
        record = {"raw_caption": "a photo", "long_caption": "A photo. It is small."}
        samples = {f"{n}": {"jpg": jpeg(n), "json": json.dumps(record).encode()} for n in range(8)}
        write_shard(tmp_path / f"{shard:05d}.tar", samples)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 8, "00001.tar": 8}')
    shards = f"local://{tmp_path}/{{00000..00001}}.tar"
    words = {"s3://bucket/set/{00000..01999}.tar": shards, "MODEL": "lotlip_tiny", "256": "8"}
    assert run_page(PAGE.read_text().split("## From a data set")[1], words) == 2
    assert "16 samples in 2 shards, 16 usable" in capsys.readouterr().out
    (metrics,) = (tmp_path / "logs").glob("*/metrics.jsonl")
    assert sum("train/loss" in line for line in metrics.read_text().splitlines()) > 0


def test_bytes_of_a_photo_and_its_caption_survive(tmp_path):
    buffer = io.BytesIO()
    rows = []
    for number in range(6):
        buffer = io.BytesIO()
        photo(number).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption": [f"a {number}", f"b {number}"]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert prepare(["split", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "out"), "--test", "0.34"]) == 0
    found = [
        row for name in ("train", "test") for row in pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
    ]
    assert sorted(row["caption"] for row in found) == sorted(row["caption"] for row in rows)
    assert {row["image"]["bytes"] for row in found} == {row["image"]["bytes"] for row in rows}


def test_captions_that_are_texts_or_lists_and_columns_of_one_table_alone_survive(tmp_path):
    for number in range(4):
        photo(number).save(tmp_path / f"{number}.png")
    rows = [{"filepath": f"{n}.png", "caption": [f"a {n}", f"b {n}"] if n % 2 else f"a {n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"filepath": "3.png", "title": "c", "caption": None}))
    argv = ["split", f"{tmp_path / 'a.jsonl'}::{tmp_path / 'b.jsonl'}", "--test", "0.25"]
    assert prepare([*argv, "--out", str(tmp_path / "out")]) == 0
    found = [r for name in ("train", "test") for r in pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()]
    expected = {
        "0.png": (["a 0"], None),
        "1.png": (["a 1", "b 1"], None),
        "2.png": (["a 2"], None),
        "3.png": (None, "c"),
    }
    assert {Path(row["filepath"]).name: (row["caption"], row["title"]) for row in found} == expected
