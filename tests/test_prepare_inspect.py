"""The report on a shard set equals a slow count, and its page shows captions as text."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from test_train_data import write_shard

from training import get_tokenizer
from training.prepare.__main__ import main
from training.readers.samples import read_samples

EVIL = '<script>alert("x")</script><img src=x onerror=y> & &amp; "A dog."'


def image_bytes(number: int, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    for s in range(2):
        samples = {}
        for n in range(30 * s, 30 * s + 30):
            record = {"url": f"http://a/{n if n != 7 else 6}", "raw_caption": f"number {n}"}
            record["longSV_captions"] = "A dog runs. " * (n + 1) if n % 10 else "I'm sorry, I cannot see it."
            record["longIB_captions"] = ["A list.", "Of sentences."] if n % 2 else None
            record["my_caption"] = EVIL
            content = image_bytes(n if n != 9 else 8, 20 + n % 3, 30)
            samples[f"{n:04d}"] = {"jpg": content, "json": json.dumps(record).encode()}
        samples[f"x{s}"] = {"jpg": b"no image", "json": b"{}"}
        samples[f"y{s}"] = {"json": b'{"raw_caption": "a"}'}
        samples[f"z{s}"] = {"jpg": image_bytes(200 + s, 20, 30), "json": b"{"}
        write_shard(folder / f"{s}.tar", samples)
    return folder


def inspect(shards: Path, out: Path, *flags: str, code: int = 0) -> dict:
    words = ["inspect", str(shards), "--out", str(out), "--model", "lotlip_tiny", "--workers", "1", *flags]
    assert main(words) == code
    return json.loads((out / "inspect.json").read_text())


@pytest.fixture(scope="module")
def report(shards, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("report")
    return inspect(shards, out, "--context-lengths", "20,64", "--seed", "3"), out


def test_counts_are_those_of_a_loop_over_the_samples(report, shards):
    tokenizer = get_tokenizer("lotlip_tiny")
    texts: dict[str, list[str]] = {}
    for s in range(2):
        for sample in read_samples(str(shards / f"{s}.tar")):
            if sample.key.isdecimal():
                for key, value in json.loads(sample.files["json"]).items():
                    if key.endswith(("caption", "captions")) and value:
                        texts.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    counted = report[0]
    assert counted["samples"] == 66 and counted["usable"] == 60
    assert counted["bad"] == {"broken JSON": 2, "broken image": 2, "no image": 2}
    assert counted["with_short_caption"] == counted["with_long_caption"] == 60
    assert set(counted["captions"]) == set(texts)
    for key, those in texts.items():
        lengths = [len(tokenizer(text, context_length=10_000, padding=False)[0]) for text in those]
        got = counted["captions"][key]
        assert got["captions"] == len(those) and got["mean_tokens"] == round(sum(lengths) / len(those), 2)
        assert got["token_quantiles"]["1.0"] == max(lengths)
        assert {int(n): count for n, count in got["token_histogram"].items()} == {n: lengths.count(n) for n in lengths}
        for limit in (20, 64, tokenizer.context_length):
            assert got["truncated_share"][str(limit)] == round(sum(n > limit for n in lengths) / len(those), 6)
    assert counted["captions"]["longSV_captions"]["refused"] == 6
    lists = counted["captions"]["longIB_captions"]
    assert (lists["samples"], lists["captions"]) == (30, 60)  # a list holds alternatives
    assert counted["image_width"]["min"] == 20 and counted["image_width"]["max"] == 22
    assert counted["duplicates"] == {"image": 0, "key": 0, "url": 1}


def test_page_shows_fifty_samples_as_text(report):
    page = (report[1] / "samples.html").read_text()
    tags, shown = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

        def handle_data(self, data):
            shown.append(data)

    Reader().feed(page)
    assert tags.count("article") == tags.count("img") == 50 and "script" not in tags
    assert shown.count(EVIL) == 50
    images = re.findall(r"base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(images[0]))).size[1] == 30


def test_the_same_whatever_number_of_shards_at_once(report, shards, tmp_path):
    names = "::".join(str(shards / f"{s}.tar") for s in (1, 0))
    inspect(Path(names), tmp_path, "--context-lengths", "20,64", "--seed", "3")
    assert (tmp_path / "inspect.json").read_bytes() == (report[1] / "inspect.json").read_bytes()
    body = [(folder / "samples.html").read_text().split("</h1>")[1] for folder in (tmp_path, report[1])]
    assert body[0] == body[1]


def test_broken_shards_and_hidden_damage(shards, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    whole = (shards / "0.tar").read_bytes()
    (tmp_path / "set" / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    half = image_bytes(1, 20, 30)
    write_shard(tmp_path / "set" / "half.tar", {"a": {"jpg": half[: len(half) - 30], "txt": b"a"}})
    counted = inspect(tmp_path / "set", tmp_path / "out", "--show", "0", "--read-images", code=1)
    assert counted["bad"]["broken shard"] == 1 and counted["bad"]["broken image"] == 1
    assert [Path(p).name for p in counted["broken_shards"]] == ["cut.tar"]
    assert "1 broken shard" in capsys.readouterr().out
