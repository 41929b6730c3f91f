"""Tar shards found in practice: training, evaluation and inspection read the same samples, or report the same fault."""

import io
import json
import random
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from test_faults import GOOD, image_bytes, load
from test_train_data import write_shard

from dataloaders.own import read_shard_pairs
from training.data.shards import ShardSource
from training.data.sizes import count_samples, expand_sources
from training.prepare.__main__ import main as prepare
from training.prepare.shards import read_json_samples, rewrite_shard
from training.readers.samples import BrokenShardError, index_shard, read_samples
from training.readers.streams import expand_shards
from training.readers.tar import TarReader


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
    additions = [{"long_caption": f"l{n}"} for n in range(len(before))]
    rewrite_shard(path, tmp_path / "new.tar", read_json_samples(path), additions)
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


@pytest.mark.parametrize("command", ["gzip -c", "bzip2 -c", "zstd", "cat"])
def test_compressed_shards_are_read_everywhere(tmp_path, command, caplog):
    shard = Path(write_shard(tmp_path / "plain.tar", {f"{n}": GOOD | {"txt": f"{n}".encode()} for n in range(9)}))
    if command == "zstd":
        packed = pa.compress(shard.read_bytes(), "zstd", asbytes=True)
    else:
        packed = subprocess.run([*command.split(), shard], stdout=subprocess.PIPE, check=True).stdout
    path = tmp_path / "s.tar.packed"
    path.write_bytes(packed)
    expected = [s.files for s in read_samples(str(shard))]
    for url in (str(path), f"pipe:cat {path}"):
        for first in (0, 4):
            assert [s.files for s in read_samples(url, first)] == expected[first:]
        pairs = read_shard_pairs(url, ["caption"], "raw")
        assert list(pairs.captions) == [f"{n}" for n in range(9)]
        assert [p.open().read() for p in pairs.image_paths] == [files["jpg"] for files in expected]
    assert count_samples([str(path)]) == [9]
    keys = sorted(s.key for s in ShardSource([str(path)], [9], seed=0).read(0, 0, 9))
    assert keys == [f"{n}" for n in range(9)]
    if command != "cat":
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(BrokenShardError, match="s.tar.packed: (broken compression|truncated)"):
            list(read_samples(str(path), waits=()))


def test_what_follows_the_end_of_an_archive_is_ignored_and_said(tmp_path, caplog):
    shard = Path(write_shard(tmp_path / "s.tar", {f"{n}": GOOD for n in range(3)}))
    whole = shard.read_bytes()
    for rest, is_said in ((bytes(700), False), (bytes(1 << 16), False), (b"junk", True), (b"junk" * 999, True)):
        caplog.clear()
        shard.write_bytes(whole + rest)
        assert [s.key for s in read_samples(str(shard))] == ["0", "1", "2"] and count_samples([str(shard)]) == [3]
        assert len(read_shard_pairs(str(shard), ["caption"], "raw").captions) == 3
        assert is_said == ("after the end of the archive, is ignored" in caplog.text)


def test_leftovers_and_pickles_beside_images_cost_no_sample(tmp_path, caplog):
    leftovers = [(f".ipynb_checkpoints/{name}", data) for name, data in files("0-checkpoint", 7)]
    others = [("Thumbs.db", b"x"), ("__MACOSX/d/._0.jpg", b"x"), ("./d/desktop.ini", b"x")]
    samples = [m for n in range(3) for m in files(f"./d/{n}", n, pth=b"cos\nsystem\n")]
    path = str(pack(tmp_path / "s.tar", [*leftovers, *samples, *others]))
    assert [s.key for s in read_samples(path)] == ["./d/0", "./d/1", "./d/2"]
    assert "s.tar: 3 files of pickled data" in caplog.text
    assert read_shard_pairs(path, ["caption"], "raw").captions == ("number 0", "number 1", "number 2")
    out = tmp_path / "out"
    assert prepare(["inspect", path, "--out", str(out), "--model", "lotlip_tiny", "--workers", "1"]) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert report["usable"] == report["samples"] == 3 and not report["bad"]


@pytest.mark.parametrize(("suffix", "size"), [("jpg", (1 << 28) + 1), ("txt", (1 << 24) + 1), ("json", (1 << 24) + 1)])
def test_a_member_larger_than_it_can_be_is_never_read(tmp_path, suffix, size):
    """Its content is a hole of the file system; reading it would take that much memory."""
    shard = write_shard(tmp_path / "s.tar", {"0": GOOD, "1": GOOD})
    member = tarfile.TarInfo(f"huge.{suffix}")
    member.size = size
    with open(shard, "r+b") as file:
        file.seek(index_shard(shard).offsets[-1])
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + size + -size % 512)
    tracemalloc.start()
    found = list(read_samples(shard))
    assert found[1].fault == "file too large" and not found[1].files
    with pytest.raises(ValueError, match="file too large"):
        read_shard_pairs(shard, ["caption"], "raw")
    assert [s.fault for s in read_json_samples(shard)] == [None, "file too large"]
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_names_as_webdataset_users_write_them(tmp_path, monkeypatch):
    path = str(pack(tmp_path / "a b" / "0.tar", files("x")))
    monkeypatch.setenv("SHARDS", str(tmp_path / "a b"))
    for name in ("${SHARDS}/0.tar", "$SHARDS/{0..0}.tar", f"file:{path}", f"file://{path}", "${SHARDS}"):
        assert expand_sources(name) == [[path]]
    assert [s.key for s in read_samples(expand_shards('pipe:cat "${SHARDS}"/{0..0}.tar')[0])] == ["x"]
    with pytest.raises(ValueError, match="the environment variable NOWHERE_AT_ALL is not set"):
        expand_shards("${NOWHERE_AT_ALL}/0.tar")
    (tmp_path / "loose" / "00000").mkdir(parents=True)
    (tmp_path / "loose" / "00000.parquet").touch()
    with pytest.raises(ValueError, match="loose: no .*tar in this folder, which holds 1 .parquet, 1 folders"):
        expand_shards(str(tmp_path / "loose"))


@pytest.mark.parametrize("name", ["a.b.c", "a b, c", "100%41", "\u00e9e\u0301", "\u4e2d\u6587", "caf\udce9"])
def test_names_of_every_kind_are_keys(tmp_path, name):
    path = str(pack(tmp_path / "s.tar", [*files("0"), *files(f"d/{name}", 1), *files("2", 2)]))
    samples = list(read_samples(path))
    if name == "a.b.c":  # the suffix begins at the first full stop, as in webdataset
        assert [len(s.files) for s in samples] == [2, 0, 2]
        return
    assert [s.files["txt"] for s in samples] == [b"number 0", b"number 1", b"number 2"]
    pairs = read_shard_pairs(path, ["caption"], "raw")
    assert [p.open().read() for p in pairs.image_paths] == [s.files["jpg"] for s in samples]
    rewrite_shard(Path(path), tmp_path / "new.tar", read_json_samples(Path(path)), [{"a": 1}] * 3)
    assert [s.key for s in read_samples(str(tmp_path / "new.tar"))] == [s.key for s in samples]


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
    assert len(glued.captions) == 2 and "1 of 2 samples have a .txt of several lines" in caplog.text
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
