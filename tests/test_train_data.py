"""Shards and tables read by the loader: every sample exactly once, in an order that can be resumed."""

import errno
import io
import json
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from training.data.captions import CaptionRule
from training.data.images import ImageReader
from training.data.loader import NoUsableSampleError, make_loader
from training.data.order import Share
from training.data.reader import SampleReader
from training.data.shards import ShardSource, StreamedShards
from training.data.sizes import count_samples, expand_sources
from training.data.tables import read_tables
from training.prepare.work import processes
from training.readers.samples import index_shard, read_samples


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]], form: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def good(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number), "json": json.dumps({"caption": f"s{number}", "long_caption": f"l {number}"}).encode()}


def make_shards(folder: Path, sizes: list[int]) -> list[str]:
    number, urls = 0, []
    for s, size in enumerate(sizes):
        urls.append(write_shard(folder / f"{s:03d}.tar", {f"{n:06d}": good(n) for n in range(number, number + size)}))
        number += size
    return urls


def tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text)] for text in texts])


def reader(seed: int = 0, epoch: int = 0, **rule) -> SampleReader:
    return SampleReader(
        ImageReader(lambda image: pil_to_tensor(image).float()), tokenizer, CaptionRule(**rule), seed, epoch
    )


def batches(source, share: Share, workers: int, epoch: int = 0) -> list:
    return list(make_loader(source, reader(epoch=epoch), share, workers, pin=False))


def test_workers_outlive_a_signal_from_their_first_moment_on(tmp_path):
    """SLURM may send SIGTERM while they start: here each gets one directly after the fork, before torch's handler."""
    source, share = ShardSource(make_shards(tmp_path, [7, 5]), [7, 5], seed=0), Share(4, 3)
    expected, is_on = batches(source, share, workers=0), [True]
    os.register_at_fork(after_in_child=lambda: is_on and os.kill(os.getpid(), signal.SIGTERM))
    try:
        got = batches(source, share, workers=2)
    finally:
        is_on.clear()
    assert sorted(key for b in got for key in b.keys) == sorted(key for b in expected for key in b.keys)


SMALL = "mount -t tmpfs -o {} none /dev/shm && exec {} -c '{}'"  # like Docker's 64 MB, where batches are larger
LOAD = """
import logging, torch
from training.runtime.workers import Loader
logging.basicConfig()
batches = [dict(image=torch.full((3, 50_000), n, dtype=torch.uint8), text=(torch.tensor(n),)) for n in range(12)]
for n, batch in enumerate(Loader(batches, 2, pin=False)):
    assert batch["image"].shape == (3, 50_000) and (batch["image"] == n).all() and batch["text"][0] == n
print("complete")
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("size=256k", "complete"),
        *[(options, "no shared memory (/dev/shm) to start processes") for options in ("size=1k", "ro")],
    ],
)
def test_batches_arrive_through_a_small_shared_memory(options, said):
    new_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*new_mounts, SMALL.format(options, "true", "")], capture_output=True).returncode:
        pytest.skip("mounting needs rights that this process does not have")
    command = SMALL.format(options, sys.executable, LOAD)
    done = subprocess.run([*new_mounts, command], capture_output=True, text=True, timeout=100)
    assert said in done.stdout + done.stderr, done.stderr
    assert "--shm-size" in done.stderr and "--workers 0" in done.stderr and done.stderr.count("--ipc=host") <= 2


def test_preparation_without_shared_memory_names_it(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(OSError, match=r"shared memory \(/dev/shm\).*--shm-size.*--workers 1"), processes(2):
        pass


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_finds_the_samples_that_tarfile_finds(tmp_path, form):
    keys = ["a/0001", "a/0002", "b/" + "long" * 24 + "/0003", "b/äöü"] + (
        ["c/" + "very" * 60 + "/0005"] if form != tarfile.USTAR_FORMAT else []
    )
    path = write_shard(tmp_path / "x.tar", {key: good(n) for n, key in enumerate(keys)}, form)
    index = index_shard(path)
    assert index.fault is None and len(index.offsets) == len(keys)
    assert [s.key for s in read_samples(path)] == keys
    for first in range(len(keys)):  # tarfile can begin to read at each offset
        assert [s.key for s in read_samples(path, first)] == keys[first:]
        assert next(read_samples(path, first)).files == good(first)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_sees_every_sample_once_however_it_is_divided(tmp_path, world_size, workers):
    urls = make_shards(tmp_path, [7, 1, 13, 3])  # fewer shards than world_size x workers
    source = ShardSource(urls, count_samples(urls), seed=1, window=5)
    seen = []
    for rank in range(world_size):
        share = Share(2, 24 // world_size // 2, rank, world_size)
        for batch in batches(source, share, workers):
            assert batch.inputs["image"].shape == (2, 3, 8, 8) and batch.inputs["long_text"].shape == (2, 3, 1)
            assert not batch.bad_samples
            seen += batch.keys
    assert len(seen) == 24 and len(set(seen)) == 24


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    urls = make_shards(tmp_path, [20, 20])

    def keys(seed: int, epoch: int) -> list[str]:
        return [s.key for s in ShardSource(urls, [20, 20], seed).read(epoch, 0, 40)]

    assert keys(0, 0) == keys(0, 0)
    assert keys(0, 0) != keys(1, 0) != keys(1, 1) and sorted(keys(0, 0)) == sorted(keys(1, 1))


def sources(folder: Path) -> dict:
    urls = make_shards(folder, [9, 4, 11])
    (folder / "images").mkdir()
    for number in range(24):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
    table = pa.table({"filepath": [f"images/{n}.jpg" for n in range(24)], "caption": [f"s{n}" for n in range(24)]})
    pq.write_table(table, folder / "t.parquet")
    return {
        "shards": ShardSource(urls, [9, 4, 11], seed=0, window=4),
        "resampled": ShardSource(urls, [9, 4, 11], seed=0, window=4, factors=[1, 5, 1], num_drawn=24),
        "streamed": StreamedShards([f"pipe:cat {url}" for url in urls], [1, 5, 1], num_samples=24, seed=0, window=4),
        "table": read_tables([folder / "t.parquet"], "filepath", ("caption",), None, seed=0),
    }


@pytest.mark.parametrize("kind", ["shards", "resampled", "streamed", "table"])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_loader_continues_exactly_where_another_stopped(tmp_path, kind, workers):
    source = sources(tmp_path)[kind]
    whole = batches(source, Share(2, 11), workers, epoch=1)
    for num_done in (1, 4, 5, 10):
        used = dict.fromkeys(range(max(workers, 1)), 0) | dict(b.position for b in whole[:num_done])
        rest = batches(source, Share(2, 11, batches_done=num_done, slots_done=tuple(used.values())), workers, epoch=1)
        assert [b.keys for b in rest] == [b.keys for b in whole[num_done:]]
        assert all(torch.equal(a.inputs["image"], b.inputs["image"]) for a, b in zip(rest, whole[num_done:]))


def test_resampling_follows_the_factors(tmp_path):
    urls = make_shards(tmp_path, [5, 5])
    drawn = {"seed": 0, "factors": [9, 1]}
    for source in (ShardSource(urls, [5, 5], num_drawn=5000, **drawn), StreamedShards(urls, num_samples=5000, **drawn)):
        first = sum(s.source == "000.tar" for s in source.read(0, 0, 5000))
        assert 0.85 < first / 5000 < 0.95


def test_drawing_from_a_shard_without_samples_ends(tmp_path):
    empty, broken = write_shard(tmp_path / "0.tar", {}), tmp_path / "1.tar"
    broken.write_bytes(b"x" * 600)
    found = list(StreamedShards([empty, str(broken)], [1, 1], num_samples=9, seed=0).read(0, 0, 9))
    assert len(found) == 9 and {sample.fault for sample in found} == {"broken shard"}
    assert {sample.source.split(": ")[1] for sample in found} == {
        "no sample in it",
        "not a tar file, or broken at byte 0; fetch or pack it again",
    }
    assert ShardSource([empty], [0], seed=0, factors=[1], num_drawn=9).num_samples == 0


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 4), (2, 4)])
def test_resampling_draws_every_sample_equally_often(tmp_path, world_size, workers):
    urls = []
    for shard in range(4):
        urls.append(str(tmp_path / f"{shard}.tar"))
        with tarfile.open(urls[-1], "w") as file:
            for number in range(100):
                member = tarfile.TarInfo(f"{number:03d}.txt")
                member.size = 1
                file.addfile(member, io.BytesIO(b"x"))
    source, counts = ShardSource(urls, [100] * 4, seed=0, window=25, factors=[1] * 4, num_drawn=160), Counter()
    share = 160 // world_size // workers
    for epoch in range(50):
        for part in range(world_size * workers):
            counts.update((s.source, s.key) for s in source.read(epoch, part * share, (part + 1) * share))
    assert counts.total() == 8_000 and len(counts) == 400  # uniform draws miss a sample in one of 10^6 runs
    by_position = Counter(int(key) // 25 for _, key in counts.elements())
    assert all(n == pytest.approx(2000, rel=0.2) for n in by_position.values()), by_position


FAULTS = {
    "broken image": {"jpg": jpeg(0)[:60], "txt": b"a"},
    "no image": {"txt": b"a"},
    "no caption": {"jpg": jpeg(0), "json": b'{"url": "http://"}'},
    "broken JSON": {"jpg": jpeg(0), "json": b'{"caption": "a'},
    "JSON not an object": {"jpg": jpeg(0), "json": b'["a"]'},
    "text not UTF-8": {"jpg": jpeg(0), "txt": b"\xff\xfe\xfa"},
}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_by_kind_and_their_places_filled(tmp_path, workers):
    samples = {f"{n:04d}": good(n) for n in range(20)} | {f"bad{i}": files for i, files in enumerate(FAULTS.values())}
    url = write_shard(tmp_path / "0.tar", samples)
    made = batches(ShardSource([url], [26], seed=0), Share(2, 13), workers)
    faults = [fault for batch in made for fault in batch.bad_samples]
    assert len(made) == 13 and all(len(b.keys) == 2 for b in made)
    # Bad samples are replaced from the start of a worker's own share, so some faults may occur again.
    assert set(faults) == {(kind, f"0.tar/bad{i}") for i, kind in enumerate(FAULTS)}
    assert {key for b in made for key in b.keys} <= {f"0.tar/{n:04d}" for n in range(20)}


def test_a_truncated_shard_is_used_up_to_its_end(tmp_path, caplog):
    whole = make_shards(tmp_path, [10])[0]
    content = Path(whole).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: index_shard(whole).offsets[6] + 700])
    assert count_samples([str(cut)]) == [7]
    assert "truncated" in caplog.text and "7 samples" in caplog.text
    items = list(ShardSource([str(cut)], [7], seed=0).read(0, 0, 7))
    assert sum(not i.key for i in items) == 1 and len(items) == 7
    # sizes.json counts more samples: each missing one is a fault
    items = list(ShardSource([str(cut)], [12], seed=0).read(0, 0, 12))
    assert sum(not i.key for i in items) == 6 and len(items) == 12


def test_nothing_usable_ends_the_loader_with_an_error(tmp_path):
    url = write_shard(tmp_path / "0.tar", {"a": FAULTS["broken JSON"], "b": FAULTS["no image"]})
    with pytest.raises(NoUsableSampleError, match="no usable sample in slots 0 to 2"):
        batches(ShardSource([url], [2], seed=0), Share(1, 2), workers=0)


def test_sizes_json_is_taken_for_remote_shards(tmp_path):
    make_shards(tmp_path, [3, 4])
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 4}))
    urls = expand_sources(f"file://{tmp_path}/{{000..001}}.tar")[0]
    assert count_samples(urls) == [3, 4]
    keys = [s.key for s in ShardSource(urls, [3, 4], seed=0).read(0, 0, 7)]
    assert sorted(keys) == [f"{n:06d}" for n in range(7)]


def test_pipes_are_read(tmp_path):
    url = "pipe:cat " + make_shards(tmp_path, [3])[0]
    assert [s.key for s in read_samples(expand_sources(url)[0][0])] == ["000000", "000001", "000002"]


def test_csv_tsv_and_parquet_give_the_same_rows(tmp_path):
    rows = [
        ("a.jpg", 'a "quoted", text\nof two lines', "long one. äöü"),
        ("/abs/b.jpg", "NA", ""),
        ("c.jpg", "1.50", "x"),
    ]
    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        quoted = [separator.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
        (tmp_path / name).write_text("\n".join([separator.join(("path", "txt", "long_caption")), *quoted, ""]))
    columns = dict(zip(("path", "txt", "long_caption"), map(list, zip(*rows))))
    pq.write_table(pa.table(columns | {"other": [1, 2, 3]}), tmp_path / "t.parquet")
    read = {}
    for name in ("t.csv", "t.tsv", "t.parquet"):
        source = read_tables([tmp_path / name], "path", ("txt", "long_caption"), None, seed=3)
        read[name] = [(s.image_path, s.record) for s in source.read(0, 0, 3)]
    assert read["t.csv"] == read["t.tsv"] == read["t.parquet"]
    paths = [str(tmp_path / "a.jpg"), "/abs/b.jpg", str(tmp_path / "c.jpg")]
    assert sorted(read["t.csv"], key=str) == sorted(
        [(p, {"txt": r[1], "long_caption": r[2]}) for p, r in zip(paths, rows)], key=str
    )


def test_rows_of_the_wrong_length_are_left_out_and_reported(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("filepath,txt\na.jpg,one\nb.jpg\nc.jpg,two,three\nd.jpg,four\n")
    source = read_tables([tmp_path / "t.csv"], "filepath", ("txt",), None, seed=0)
    assert source.num_samples == 2 and "2 of 4 rows left out: line 3: 1 cells, the header has 2" in caplog.text


def test_augmentation_is_a_function_of_seed_epoch_and_sample(tmp_path):
    sample = next(read_samples(make_shards(tmp_path, [1])[0]))

    def noisy(seed: int, epoch: int) -> float:
        images = ImageReader(lambda image: torch.rand(1) + random.random())
        noise = SampleReader(images, tokenizer, CaptionRule(), seed, epoch)
        return float(noise(sample).inputs["image"])

    assert noisy(0, 0) == noisy(0, 0) and len({noisy(0, 0), noisy(0, 1), noisy(1, 0)}) == 3
