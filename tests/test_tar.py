"""Tar shards found in practice: training, evaluation and inspection read the same samples, or report the same fault."""

import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_faults import GOOD, image_bytes, load
from test_train_data import write_shard

from dataloaders.own_pairs import read_shard_pairs
from training.data.shards import ShardSource, count_samples, expand_sources
from training.data.tar import BrokenShardError, index_shard, read_samples
from training.prepare.__main__ import main as prepare
from training.prepare.shards.files import read_json_samples, rewrite_shard
from training.readers.tar import TarReader, expand_shards


def pack(path: Path, members: list[tuple[str, bytes | str]], form: int = tarfile.GNU_FORMAT) -> Path:
    """Writes members in this order; a text as content makes a hard link to the member of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def files(key: str, number: int = 0, **more: bytes) -> list[tuple[str, bytes]]:
    """Returns the members of a sample whose caption contains its number."""
    content = {"jpg": image_bytes(number), "txt": f"number {number}".encode(), **more}
    return [(f"{key}.{suffix}", data) for suffix, data in content.items()]


def with_sparse_files(folder: Path, form: str) -> Path:
    """Packs three samples with tar; the image of the second has a hole."""
    for number in range(3):
        for name, content in files(f"{number}", number):
            (folder / name).write_bytes(content)
    with open(folder / "1.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    names = [f"{n}.{suffix}" for n in range(3) for suffix in ("jpg", "txt")]
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", "s.tar", *names], cwd=folder, check=True)
    return folder / "s.tar"


def joined(folder: Path) -> Path:
    """Runs `cat a.tar b.tar`, where the second archive begins with the key that ends the first."""
    parts = [pack(folder / f"{n}.t", [*files("a", n), *files("b", n + 1), *files("a", n + 2)]) for n in (0, 3)]
    (folder / "s.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / "s.tar"


def interleaved(folder: Path) -> Path:
    images_first = [files(str(n), n)[part] for part in (0, 1) for n in range(4)]
    return pack(folder / "s.tar", images_first)


MAC = [
    (f"d/._{name[2:]}", b"\0\5\26\7") if n % 2 else (name, content) for name, content in files("d/x") for n in (1, 0)
]
# name -> (function that writes it, captions in order, bad samples by kind, message of evaluation, which refuses it)
FORMS = {
    "twice in a row": (
        lambda f: pack(f / "s.tar", [m for n in range(3) for m in files("same", n)]),
        ["number 0", "number 1", "number 2"],
        {},
        None,
    ),
    "joined": (joined, [f"number {n}" for n in range(6)], {}, None),
    "macOS": (lambda f: pack(f / "s.tar", [*MAC, ("._d", b"x"), *files("d/y", 1)]), ["number 0", "number 1"], {}, None),
    "v7": (lambda f: tar_of_v7(f), ["number 0", "number 1", "number 2"], {}, None),
    "sparse": (
        lambda f: with_sparse_files(f, "gnu"),
        ["number 0", "number 2"],
        {"sparse file": 1},
        "sparse file: 1.jpg",
    ),
    "pax sparse": (
        lambda f: with_sparse_files(f, "posix"),
        ["number 0", "number 2"],
        {"sparse file": 1},
        "sparse file: 1",
    ),
    "link": (
        lambda f: pack(f / "s.tar", [*files("0"), ("1.jpg", "0.jpg"), ("1.txt", b"number 1"), *files("2", 2)]),
        ["number 0", "number 2"],
        {"link in the tar": 1},
        "link in the tar: 1.jpg",
    ),
    "images first": (interleaved, [], {"no caption": 4, "no image": 4}, "must be next to each other"),
}


def tar_of_v7(folder: Path) -> Path:
    for number in range(3):
        for name, content in files(f"{number}", number):
            (folder / name).write_bytes(content)
    names = [f"{n}.{suffix}" for n in range(3) for suffix in ("jpg", "txt")]
    subprocess.run(["tar", "--format=v7", "-cf", "s.tar", *names], cwd=folder, check=True)
    return folder / "s.tar"


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_in_training_evaluation_and_inspection(tmp_path, form):
    make, captions, bad, refusal = FORMS[form]
    path = make(tmp_path)
    samples = list(read_samples(str(path)))
    assert count_samples([str(path)]) == [len(samples)]
    for first in range(len(samples)):
        assert [s.files for s in read_samples(str(path), first)] == [s.files for s in samples[first:]]
    if form != "images first":
        assert [s.files["txt"].decode() for s in samples if not s.fault and "txt" in s.files] == captions
        batch = load(ShardSource([str(path)], [len(samples)], seed=0), 1, len(captions))[0]
        assert {kind for kind, _ in batch.bad_samples} <= set(bad)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            read_shard_pairs(str(path), ["caption"], "raw")
    else:
        pairs = read_shard_pairs(str(path), ["caption"], "raw")
        assert list(pairs.captions) == captions and len(pairs.image_paths) == len(captions)
        assert [p.open().read() for p in pairs.image_paths] == [s.files["jpg"] for s in samples]
    out = tmp_path / "out"
    assert prepare(["inspect", str(path), "--out", str(out), "--model", "lotlip_tiny", "--workers", "1"]) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert report["samples"] == len(samples) == report["usable"] + sum(report["bad"].values())
    assert report["usable"] == len(captions) and report["bad"] == bad


def test_rewriting_keeps_every_byte_and_every_sample(tmp_path):
    members = [*MAC, ("README", b"x" * 700), *files("d/y", 1), ("d/y.json", b'{"a": 1}'), *files("d/y", 2)]
    path = pack(tmp_path / "s.tar", members)
    (tmp_path / "more").mkdir()
    path.write_bytes(path.read_bytes() + joined(tmp_path / "more").read_bytes())
    before = list(read_samples(str(path)))
    rewrite_shard(path, tmp_path / "new.tar", [{"long_caption": f"l{n}"} for n in range(len(before))])
    after = list(read_samples(str(tmp_path / "new.tar")))
    assert [s.key for s in after] == [s.key for s in before] and len(after) == 9
    for number, (new, old) in enumerate(zip(after, before)):
        assert json.loads(new.files.pop("json")) == json.loads(old.files.pop("json", b"{}")) | {
            "long_caption": f"l{number}"
        }
        assert new.files == old.files
    assert [s.record for s in read_json_samples(tmp_path / "new.tar")][1] == {"a": 1, "long_caption": "l1"}
    with tarfile.open(tmp_path / "new.tar") as tar:  # a single archive now, which other readers read to its end
        assert len(tar.getmembers()) == len(members) + 12 + 8 and tar.extractfile("README").read() == b"x" * 700


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_shard_loses_no_more_than_is_damaged(tmp_path, seed):
    """After a cut or overwritten bytes, the samples before are read; the index counts these and the broken one."""
    rng = random.Random(seed)
    path = pack(tmp_path / "s.tar", [m for n in range(9) for m in files(f"{n}", n)])
    whole, offsets = path.read_bytes(), index_shard(path).offsets
    for _ in range(25):
        place = rng.randrange(1, offsets[-1])
        path.write_bytes(whole[:place] if rng.random() < 0.5 else whole[:place] + b"#" * 1024 + whole[place + 1024 :])
        got, fault = [], None
        try:
            for sample in read_samples(str(path)):
                got.append(sample)
        except BrokenShardError as error:
            fault = error
        intact = sum(end <= place for end in offsets[1:])
        assert len(got) >= intact - bool(fault)  # the sample before an unreadable header may lack members
        assert [s.key for s in got[: intact - 1]] == [str(n) for n in range(intact - 1)]
        index = index_shard(path)
        assert bool(index.fault) == bool(fault) and len(index.offsets) - len(got) == (place >= 512 and bool(fault))


def test_compressed_shards_are_refused_with_the_command_that_reads_them(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {f"{n}": GOOD for n in range(3)})
    subprocess.run(["gzip", "s.tar"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"s.tar.gz: compressed; .*'pipe:gunzip -c .*s.tar.gz'"):
        count_samples([f"{shard}.gz"])
    with pytest.raises(ValueError, match="compressed"):
        read_shard_pairs(f"{shard}.gz", ["caption"], "raw")
    assert len(list(read_samples(f"pipe:gunzip -c {shard}.gz"))) == 3


def test_a_pipe_that_is_closed_early_is_no_failure(tmp_path, caplog):
    shard = write_shard(tmp_path / "s.tar", {f"{n:04d}": GOOD for n in range(400)})  # more than the buffer of a pipe
    for command in (f"cat {shard}", f"cat {shard}; sleep 600", f"cat {shard}; exit 3"):
        assert [s.key for s in read_samples(f"pipe:{command}", 2, 5)] == ["0002", "0003", "0004"]
        reading = read_samples(f"pipe:{command}")
        assert next(reading).key == "0000"
        reading.close()
    assert not caplog.records
    assert expand_sources(f"pipe:cat {shard}") == [[f"pipe:cat {shard}"]]


@pytest.mark.parametrize("name", ["a [1] b", "{x} *", "plain"])
def test_a_folder_may_be_called_anything(tmp_path, name):
    folder = tmp_path / name
    paths = [str(pack(folder / f"{n}.tar", files(str(n), n))) for n in range(3)]
    (folder / "._0.tar").write_bytes(b"of macOS")
    assert expand_sources(str(folder)) == [paths] and expand_sources(paths[1]) == [[paths[1]]]
    assert expand_sources(f"{paths[2]}::{folder}") == [[paths[2]], paths]
    if "{" not in name:
        assert expand_shards(str(folder / "{0..2}.tar")) == expand_shards(str(folder / "*.tar")) == paths
    pairs = read_shard_pairs(str(folder), ["caption"], "raw")
    assert pairs.captions == ("number 0", "number 1", "number 2") and pairs.title == name
    assert read_shard_pairs(paths[1], ["caption"], "raw").title == "1"


def test_lines_of_a_text_are_captions_of_their_own_where_asked_for(tmp_path, caplog):
    path = pack(tmp_path / "s.tar", [*files("a", txt="one\n two \r\n\nthr\u2028ee\n".encode()), *files("b", 1)])
    glued = read_shard_pairs(str(path), ["caption"], "raw")
    assert len(glued.captions) == 2 and "1 of 2 .txt files have several lines" in caplog.text
    caplog.clear()
    lines = read_shard_pairs(str(path), ["caption"], "raw", lines=True)
    assert lines.captions == ("one", "two", "thr\u2028ee", "number 1") and lines.image_of_caption == (0, 0, 0, 1)
    assert not caplog.records


def test_members_are_those_that_tarfile_finds(tmp_path):
    long = "folder/" * 20 + "name"
    members = [(f"{long}{n}.jpg", bytes(n)) for n in (0, 1, 511, 512, 513)] + [("ä.x", b"1"), ("d/e.f.G", b"2")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = pack(tmp_path / "s.tar", members, form)
        with tarfile.open(path) as tar, open(path, "rb") as file:
            expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
            found = [m for m in TarReader(file, "s.tar").members() if m]
            assert [(m.name, m.start, m.offset, m.size) for m in found] == expected
