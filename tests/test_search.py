"""python -m training.search: against retrieval's numbers, after changes of the folder, and after a kill."""

import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from dataloaders.urban1k import read_urban1k
from support import evaluate
from training.search.__main__ import build_parser, main
from training.search.index import ImageIndex, encode_query, index_path, list_images, make_encoder


def search(images: Path, index: Path, model: str, capsys, *flags: object) -> str:
    argv = [images, "--index", index, "--model", model, "--device", "cpu", "--workers", "0", *flags]
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def rows_of(out: str) -> list[tuple[float, str]]:
    found = re.findall(r"^ *\d+ +(-?\d\.\d{4}) +(\S+)$", out, re.MULTILINE)
    return [(float(score), Path(path).name) for score, path in found]


def exported(path: Path) -> dict[str, np.ndarray]:
    table = parquet.read_table(path).to_pydict()
    return {Path(name).name: np.array(vector) for name, vector in zip(table["path"], table["vector"])}


@pytest.fixture
def copies(scenes, tmp_path) -> Path:
    """Writes 25 images in two folders."""
    folder = tmp_path / "images"
    for number, path in enumerate(read_urban1k(scenes / "urban1k").image_paths):
        (folder / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number % 2}" / path.name)
    return folder


def test_the_right_image_comes_first_as_often_as_retrieval_says(scenes, tiny_clip, copies, tmp_path):
    pairs = read_urban1k(scenes / "urban1k")
    record = evaluate(tmp_path, tiny_clip, "--urban1k-retrieval", scenes / "urban1k", "--save-features")
    saved = np.load(tmp_path / "logs" / "run" / "features" / "urban1k-retrieval.npz")
    images, texts = (saved[f"{kind}_features"].astype(np.float64) for kind in ("image", "text"))
    argv = [str(copies), "--index", str(tmp_path / "i"), "--model", tiny_clip, "--device", "cpu", "--workers", "0"]
    encoder = make_encoder(build_parser().parse_args(argv))
    folder = list_images(copies)
    index = ImageIndex(index_path(tmp_path / "i", copies, encoder))
    index.update(folder.images, encoder, 10)
    first = 0
    for caption, text, right in zip(pairs.captions, texts, pairs.image_paths):
        found = [(path.name, score) for path, score in index.search(encode_query(encoder, caption)[0], 25)]
        scores = {path.name: score for path, score in zip(pairs.image_paths, images @ text)}
        assert scores.keys() == dict(found).keys()
        for place, (name, score) in enumerate(found):  # rounding to float16 may swap nearly equal results
            assert score == pytest.approx(scores[name], abs=1e-3)
            assert scores[name] == pytest.approx(sorted(scores.values())[-1 - place], abs=1e-3)
        first += found[0][0] == right.name
    assert first / len(texts) == pytest.approx(record["urban1k-retrieval-t2i-top1"])


def test_only_new_and_changed_files_are_encoded_and_the_rest_is_forgotten(copies, tiny_clip, tmp_path, capsys):
    index = tmp_path / "index"
    query = sorted(copies.rglob("*.*"))[0]
    out = search(copies, index, tiny_clip, capsys, "--image", query, "--top", "3")
    assert "25 images (25 new, 0 removed)" in out
    assert rows_of(out)[0] == (1.0, query.name) and len(rows_of(out)) == 3
    assert "Encoded" not in search(copies, index, tiny_clip, capsys)
    files = sorted(copies.rglob("*.*"))
    files[1].unlink()
    shutil.copyfile(files[2], files[3])  # changed
    os.utime(files[3], (1e9, 1e9))
    (copies / "broken.jpg").write_text("no image")
    (copies / "notes.txt").write_text("a text")
    (copies / "png").write_text("a name without a suffix")
    (copies / ".hidden.png").write_text("macOS leaves such files")
    out = search(copies, index, tiny_clip, capsys, "--export", tmp_path / "a.parquet")
    assert "24 images (1 new, 2 removed)" in out
    assert "Unreadable files, skipped: 1" in out and "broken.jpg: not a readable image" in out
    assert "Files other than images, skipped: 2 (" in out and "1 .txt" in out and "1 png" in out
    search(copies, tmp_path / "fresh", tiny_clip, capsys, "--export", tmp_path / "b.parquet")
    kept, fresh = exported(tmp_path / "a.parquet"), exported(tmp_path / "b.parquet")
    assert kept.keys() == fresh.keys()
    for name, vector in kept.items():
        np.testing.assert_allclose(vector, fresh[name], atol=2e-3)  # other batches, float16


def test_another_model_and_another_folder_have_vectors_of_their_own(copies, tiny_clip, tmp_path, capsys):
    index = tmp_path / "index"
    search(copies, index, tiny_clip, capsys)
    assert "25 new" in search(copies, index, "lotlip_tiny", capsys)
    assert "(12 new, 0 removed)" in search(copies / "1", index, tiny_clip, capsys)
    assert "25 images (0 new, 0 removed)" in search(copies, index, tiny_clip, capsys)


def test_a_killed_call_continues_from_its_last_save(copies, tiny_clip, tmp_path, capsys):
    for number in range(20):
        shutil.copytree(copies / "0", copies / f"copy{number}")
    total, index = 25 + 20 * 13, tmp_path / "index"
    argv = [copies, "--index", index, "--model", tiny_clip, "--device", "cpu", "--workers", "0", "--save-every", "20"]
    call = subprocess.Popen(
        [sys.executable, "-m", "training.search", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert call.stdout.readline().startswith(b"Encoded 20 of 285")
    call.send_signal(signal.SIGKILL)
    call.wait()
    call.stdout.close()
    out = search(copies, index, tiny_clip, capsys, "--export", tmp_path / "resumed.parquet")
    added = int(re.search(r"\((\d+) new", out)[1])
    assert 0 < added <= total - 20 and f"{total} images" in out
    search(copies, tmp_path / "fresh", tiny_clip, capsys, "--export", tmp_path / "fresh.parquet")
    resumed, fresh = (parquet.read_table(tmp_path / f"{name}.parquet") for name in ("resumed", "fresh"))
    assert resumed["path"] == fresh["path"]
    vectors = [np.stack(table["vector"].to_numpy()) for table in (resumed, fresh)]
    np.testing.assert_allclose(*vectors, atol=2e-3)


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_thumbnails_and_takes_no_code_from_a_query(copies, tiny_clip, tmp_path, capsys):
    evil = "</p><script>alert(1)</script> a star & <b>more</b>"
    flags = ["--query", evil, "--top", "4", "--html", tmp_path / "page.html"]
    out = search(copies, tmp_path / "index", tiny_clip, capsys, *flags)
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "b" not in page.tags and evil in page.words
    assert len(page.images) == 4 and all(source.startswith("data:image/webp;base64,") for source in page.images)
    places = [page.words.index(name) for _, name in rows_of(out)]
    assert len(places) == 4 and places == sorted(places)


def test_a_text_that_is_too_long_is_named(copies, tiny_clip, tmp_path, capsys):
    out = search(copies, tmp_path / "index", tiny_clip, capsys, "--query", "star " * 100)
    assert "truncated to the model's 77 tokens; the last 25 tokens are ignored" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--query", "  "], "--query: the text is empty"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["--html", "x.html"], "--html needs --query or --image"),
        (["--export", "x.csv"], "ends with .parquet"),
        (["--query", "x", "--model", "lotlip_tinny"], "lotlip_tiny"),
        (["--query", "x", "--device", "abacus"], "--device abacus: not usable here"),
    ],
)
def test_usage_errors_exit_2(flags, said, copies, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(copies), "--index", str(tmp_path / "i"), "--model", "lotlip_tiny", *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_an_empty_folder_and_a_broken_index_are_named(copies, tiny_clip, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    search(copies, tmp_path / "index", tiny_clip, capsys)
    next((tmp_path / "index").rglob("images.arrow")).write_bytes(b"junk" * 100)
    for folder, said in (
        ("empty", "no image file in this folder"),
        ("nowhere", "no such folder"),
        ("images", "remove it"),
    ):
        argv = [tmp_path / folder, "--index", tmp_path / "index", "--model", tiny_clip, "--device", "cpu"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_unreadable_files_are_read_again_only_when_they_change(copies, tiny_clip, tmp_path, capsys):
    index, broken = tmp_path / "index", copies / "broken.jpg"
    broken.write_text("no image")
    assert "Encoded 26 of 26" in search(copies, index, tiny_clip, capsys)
    out = search(copies, index, tiny_clip, capsys)
    assert "Encoded" not in out and "Unreadable files, skipped: 1" in out and "broken.jpg" in out
    shutil.copyfile(next(copies.glob("0/*")), broken)
    out = search(copies, index, tiny_clip, capsys)
    assert "Encoded 1 of 1" in out and "26 images (1 new" in out and "Unreadable" not in out


def test_linked_folders_are_listed_once_or_named(copies, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(next(copies.glob("0/*")), tmp_path / "elsewhere" / "x.jpg")
    (copies / "a").symlink_to(tmp_path / "elsewhere")  # a folder that is only linked
    (copies / "a2").symlink_to(tmp_path / "elsewhere")
    (copies / "b").symlink_to(copies / "1")  # one that is listed anyway
    (copies / "1" / "loop").symlink_to(copies)
    found = list_images(copies)
    names = sorted(os.path.relpath(path, copies) for path in found.images.values())
    assert len(names) == 26 and sum(name.endswith("/x.jpg") for name in names) == 1
    assert not any(name.startswith("b/") for name in names) and found.others == {"folders linked again": 3}


def test_a_query_without_update_looks_at_no_file(copies, tiny_clip, tmp_path, capsys):
    index, query = tmp_path / "index", tmp_path / "query.jpg"
    shutil.copyfile(next(copies.glob("0/*")), query)
    flags = ["--image", query, "--top", "25"]
    with pytest.raises(SystemExit):
        search(copies, index, tiny_clip, capsys, *flags, "--no-update")
    assert "run once without the flag" in capsys.readouterr().err
    whole = rows_of(search(copies, index, tiny_clip, capsys, *flags))
    shutil.rmtree(copies)
    copies.mkdir()
    found = search(copies, index, tiny_clip, capsys, *flags, "--no-update", "--export", tmp_path / "all.parquet")
    assert rows_of(found) == whole and len(exported(tmp_path / "all.parquet")) == 25
