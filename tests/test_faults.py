"""Broken data of every kind: counted exactly, skipped, and never the end of a training."""

import http.server
import io
import json
import random
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_train_data import write_shard
from torchvision.transforms.functional import pil_to_tensor

from support import SMALL_LOTLIP, free_ports
from training.data.captions import CaptionRule
from training.data.images import ImageReader
from training.data.loader import make_loader
from training.data.order import Share
from training.data.reader import SampleReader
from training.data.shards import ShardSource
from training.data.sizes import count_samples
from training.main import main
from training.readers import samples as tar
from training.readers.faults import FAULT_KINDS
from training.readers.samples import index_shard, read_samples


def image_bytes(number: int = 0, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(number).randint(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def bomb() -> bytes:
    """Returns a PNG of a few kilobytes whose header says it has 400 million pixels."""
    content = bytearray(image_bytes(0, "PNG"))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def array(content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content, allow_pickle=True)
    return buffer.getvalue()


GOOD = {"jpg": image_bytes(), "txt": b"a picture"}
BAD = {
    "truncated": ("broken image", {"jpg": image_bytes()[:200], "txt": b"a"}),
    "noimage": ("no image", {"txt": b"a"}),
    "bomb": ("image too large", {"png": bomb(), "txt": b"a"}),
    "nokey": ("no caption", {"jpg": image_bytes(), "json": b'{"url": "http://"}'}),
    "blank": ("empty caption", {"jpg": image_bytes(), "json": b'{"caption": " ", "long_caption": []}'}),
    "number": ("caption not text", {"jpg": image_bytes(), "json": b'{"caption": 3}'}),
    "dict": ("caption not text", {"jpg": image_bytes(), "json": b'{"caption": {"en": "a"}}'}),
    "megabyte": ("caption too long", {"jpg": image_bytes(), "txt": b"word " * 210_000}),
    "cut": ("broken JSON", {"jpg": image_bytes(), "json": b'{"caption": "a'}),
    "deep": ("broken JSON", {"jpg": image_bytes(), "json": b"[" * 200_000}),
    "list": ("JSON not an object", {"jpg": image_bytes(), "json": b'["a"]'}),
    "latin": ("text not UTF-8", {"jpg": image_bytes(), "txt": "é".encode("latin-1")}),
    "half": ("text not UTF-8", {"jpg": image_bytes(), "json": b'{"caption": "\\ud800"}'}),
    "long": ("file too large", {"jpg": image_bytes(), "txt": b"word " * (1 << 22)}),
}


def load(source, num_batches: int, batch_size: int) -> list:
    reader = SampleReader(
        ImageReader(lambda image: pil_to_tensor(image).float()),
        lambda texts: torch.ones(len(texts), 3).long(),
        CaptionRule(),
        seed=0,
        epoch=0,
    )
    return list(make_loader(source, reader, Share(batch_size, num_batches), num_workers=0, pin=False))


def test_each_kind_is_counted_exactly_and_the_run_finishes(tmp_path):
    samples = {f"good{n:02d}": GOOD for n in range(22)} | {key: files for key, (_, files) in BAD.items()}
    # Files that other readers would unpickle are left out.
    pickle = b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."
    samples["plain"] = GOOD | {"npy": array(np.array([{"a": 1}], dtype=object)), "cls": b"7"}
    samples["plain"] |= {"pyd": pickle, "pkl": pickle, "pth": pickle}
    write_shard(tmp_path / "a.tar", samples)
    whole = write_shard(tmp_path / "b.tar", {f"more{n}": GOOD for n in range(9)})
    (tmp_path / "cut.tar").write_bytes(Path(whole).read_bytes()[: index_shard(whole).offsets[5] + 700])
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": len(samples), "b.tar": 9, "cut.tar": 9}))
    flags = "--workers 1 --batch-size 11 --epochs 1 --log-every-n-steps 1 --captions raw".split()
    places = ["--train-data", str(tmp_path), "--logs", str(tmp_path), "--name", "run", "--max-bad-samples", "1"]
    places += ["--val-data", str(tmp_path)]
    assert main([*SMALL_LOTLIP, *flags, *places]) == 0

    # The expected samples: the epoch's slots read in order, and again from the start where slots were bad.
    urls = [str(tmp_path / name) for name in ("a.tar", "b.tar", "cut.tar")]
    sizes = [len(samples), 9, 9]
    slots = sum(sizes) // 11 * 11
    expected, good = Counter(), 0
    while good < slots:
        for item in ShardSource(urls, sizes, seed=0).read(0, 0, slots):
            if good == slots:
                break
            kind = item.fault if not item.key else BAD.get(item.key, (None,))[0]
            good += kind is None
            expected.update([kind] if kind else [])
    assert set(expected) == {kind for kind, _ in BAD.values()} | {"broken shard"}
    content = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert content["totals"] == {"seen": slots + expected.total(), "skipped": dict(expected)}
    log = (tmp_path / "run" / "out.log").read_text()
    for key, (kind, _) in BAD.items():
        assert expected[kind] > 3 or f"skipped sample, {kind}: a.tar/{key}" in log
    assert f"{expected.total():,} skipped (" in log.splitlines()[-1]
    assert not Path("/tmp/pwned").exists() and "a.tar: 3 files of pickled data (pyd, pkl, pickle, pth, pt) are" in log

    # A validation reads each sample once: good ones are used, bad ones are skipped.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line for line in lines if "val/loss" in line]
    assert measured["val/num_samples"] == 22 + 1 + 9 + 5  # good, plain, b.tar, and the start of cut.tar
    assert measured["val/skipped"] == len(BAD) + 4


def noise(image) -> torch.Tensor:
    return torch.rand(1)


def test_a_sample_that_fills_a_gap_has_another_crop_and_captions(tmp_path):
    record = {"caption": "short", "long_caption": [f"Sentence {n}." for n in range(50)]}
    good = {"jpg": image_bytes(), "json": json.dumps(record).encode()}
    samples = {f"{n}": good if n < 6 else BAD["noimage"][1] for n in range(16)}
    source = ShardSource([write_shard(tmp_path / "0.tar", samples)], [16], seed=0)
    numbers = {"short": 100} | {f"Sentence {n}.": n for n in range(50)}
    rule = CaptionRule(text_views="raw, sentences(1, of=long)")
    reader = SampleReader(ImageReader(noise), lambda texts: torch.tensor([[numbers[t]] for t in texts]), rule, 0, 0)

    def read(share: Share) -> list:
        return list(make_loader(source, reader, share, num_workers=0, pin=False))

    whole = read(Share(4, 4))
    keys = [key for batch in whole for key in batch.keys]
    assert keys[:6] * 2 == keys[:12] and len(set(keys)) == 6  # three passes over the same six
    drawn = {float(pixels) for batch in whole for pixels in batch.inputs["image"]}
    assert len(drawn) == 16  # no crop occurs twice
    texts = [int(text) for batch in whole for text in batch.inputs["long_text"].flatten()]
    assert texts[:6] != texts[6:12] and texts[:4] != texts[12:]
    for done in (1, 2, 3):  # a resumed run reads the same
        rest = read(Share(4, 4, batches_done=done, slots_done=(whole[done - 1].position[1],)))
        assert [batch.keys for batch in rest] == [batch.keys for batch in whole[done:]]
        for got, expected in zip(rest, whole[done:]):
            assert all(torch.equal(got.inputs[name], value) for name, value in expected.inputs.items())


def test_too_many_bad_samples_end_training(tmp_path, capsys):
    bad = BAD["noimage"][1]
    write_shard(tmp_path / "0.tar", {f"{n:04d}": bad if n % 4 == 0 else GOOD for n in range(1200)})
    flags = "--workers 0 --batch-size 100 --epochs 1 --log-every-n-steps 1 --captions raw".split()
    places = ["--train-data", str(tmp_path / "0.tar"), "--logs", str(tmp_path), "--name", "run"]
    assert main([*SMALL_LOTLIP, *flags, *places, "--max-bad-samples", "0.2"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "no image): more than --max-bad-samples 0.2" in message and "Traceback" not in message
    assert "tar --sort=name" in message
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] < 12 and last["train/skipped"] > 200  # stopped before the epoch's end


def mutate(content: bytes, draw: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        way, place = draw.randrange(4), draw.randrange(max(len(content), 1))
        if way == 0:
            content[place : place + 1] = draw.randbytes(1)
        elif way == 1:
            del content[place : place + draw.choice((1, 50, 5000))]
        elif way == 2:
            content[place:place] = draw.randbytes(draw.choice((1, 40)))
        else:
            content[place : place + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b'","\\', b"[{[{"))
    return bytes(content)


def test_hundreds_of_mutated_samples(tmp_path):
    draw = random.Random(0)
    record = {"caption": "a dog", "long_caption": ["A dog.", "It is brown."], "raw_caption": "x"}
    samples = {f"{n:03d}": {"txt": b"ok", "jpg": image_bytes(n)} for n in range(10)}
    for number in range(600):
        form = draw.choice(("jpg", "png", "webp"))
        image = image_bytes(number, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form])
        text = json.dumps(record).encode()
        which = draw.randrange(3)
        files = {form: mutate(image, draw) if which else image, "json": mutate(text, draw) if which != 1 else text}
        samples[f"m{number:03d}"] = files
    source = ShardSource([write_shard(tmp_path / "0.tar", samples)], [len(samples)], seed=0)
    made = load(source, 1, len(samples) // 3)
    kinds = Counter(kind for kind, _ in made[0].bad_samples)
    assert set(kinds) <= set(FAULT_KINDS) and len(kinds) >= 3 and kinds.total() > 200
    assert made[0].inputs["image"].isfinite().all()


def test_mutated_shards_give_samples_or_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "RETRY_WAITS", ())
    draw = random.Random(1)
    whole = Path(write_shard(tmp_path / "0.tar", {f"{n:02d}": GOOD for n in range(12)})).read_bytes()
    broken = 0
    for number in range(80):
        path = tmp_path / f"m{number}.tar"
        path.write_bytes(mutate(whole, draw))
        items = list(ShardSource([str(path)], [12], seed=0).read(0, 0, 12))
        assert len(items) == 12
        broken += any(not item.key for item in items)
        drawn = ShardSource([str(path)], [12], seed=0, factors=[1.0], num_drawn=12).read(0, 0, 12)
        assert len(list(drawn)) == 12
    assert broken > 15


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves a file, but breaks the connection in the middle of it the first two times."""

    content = b""
    times = 0

    def do_GET(self) -> None:
        if self.path.endswith("sizes.json"):
            self.send_error(404)
            return
        type(self).times += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        whole = type(self).times > 2
        self.wfile.write(self.content if whole else self.content[: len(self.content) * self.times // 3])

    def log_message(self, *_: object) -> None:
        pass


def test_reading_continues_after_a_broken_connection(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tar, "RETRY_WAITS", (0.0, 0.0, 0.0))
    Flaky.content = Path(write_shard(tmp_path / "0.tar", {f"{n:03d}": GOOD for n in range(60)})).read_bytes()
    with http.server.ThreadingHTTPServer(("localhost", 0), Flaky) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = [s.key for s in read_samples(f"http://localhost:{server.server_port}/0.tar")]
        server.shutdown()
    assert keys == [f"{n:03d}" for n in range(60)]
    assert caplog.text.count("trying again in 0 s") >= 1


def test_an_unreachable_shard_is_a_fault_for_each_of_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "RETRY_WAITS", (0.0, 0.0))
    here = write_shard(tmp_path / "0.tar", {f"{n}": GOOD for n in range(8)})
    source = ShardSource([here, f"http://localhost:{free_ports(1)[0]}/1.tar"], [8, 4], seed=0)
    batch = load(source, 1, 12)[0]
    kinds = Counter(kind for kind, _ in batch.bad_samples)
    # Its 4 slots, and some of them again because bad samples were replaced from the start of the span.
    assert len(batch.keys) == 12 and set(kinds) == {"unreachable shard"} and 4 <= kinds["unreachable shard"] <= 8
    assert all("localhost" in name for _, name in batch.bad_samples)


def test_a_shard_removed_after_counting_is_unreachable(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "RETRY_WAITS", (0.0,))
    urls = [write_shard(tmp_path / f"{i}.tar", {f"{i}{n}": GOOD for n in range(5)}) for i in range(2)]
    sizes = count_samples(urls)
    Path(urls[1]).unlink()
    items = list(ShardSource(urls, sizes, seed=0).read(0, 0, 10))
    assert Counter(item.fault or "good" for item in items) == {"good": 5, "unreachable shard": 5}
