"""Shards on object storage: a local S3 server that is killed and restarted while shards are read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
import torch
from test_faults import GOOD
from test_train_data import write_shard

from dataloaders.own import read_shard_pairs
from support import SMALL_LOTLIP, free_ports
from training.data.shards import ShardSource
from training.data.sizes import count_samples, expand_sources, known_sizes, trusted_sizes
from training.main import main
from training.prepare.__main__ import main as prepare
from training.readers import files, samples
from training.readers.samples import read_samples

PER_SHARD = 40


class Server:
    """A local S3 server; what it holds is lost when it is killed, so `fill` puts it there."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.process = folder, free_ports(1)[0], None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        s3fs.S3FileSystem.clear_instance_cache()
        deadline = time.monotonic() + 60
        while True:
            try:
                fs = s3fs.S3FileSystem(skip_instance_cache=True)
                fs.mkdir("bucket")
                break
            except Exception:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        for path in sorted(self.folder.iterdir()):
            fs.put_file(str(path), f"bucket/set/{path.name}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    for number in range(3):
        texts = {f"{number}{n:02d}": GOOD | {"txt": f"{number}{n:02d}".encode()} for n in range(PER_SHARD)}
        write_shard(folder / f"{number:03d}.tar", texts)
    server = Server(folder)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://localhost:{server.port}"}
    server.start()
    yield server
    server.kill()
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(samples, "RETRY_WAITS", (0.1, 0.1, 0.1))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


def test_shards_are_listed_and_counted_once(server, tmp_path, monkeypatch):
    urls = [f"s3://bucket/set/{n:03d}.tar" for n in range(3)]
    for spec in ("s3://bucket/set/{000..002}.tar", "s3://bucket/set/*.tar", "s3://bucket/set/"):
        assert expand_sources(spec) == [urls]
    with pytest.raises(ValueError, match="s3://bucket/other/.*: nothing there"):
        expand_sources("s3://bucket/other/*.tar")
    cache = str(tmp_path / "index")
    assert count_samples(urls, index_cache=cache) == [PER_SHARD] * 3
    with monkeypatch.context() as patch:  # the second time, no shard is opened
        patch.setattr(samples, "index_shard", None)
        assert count_samples(urls, index_cache=cache) == [PER_SHARD] * 3
    fs = s3fs.S3FileSystem()
    fs.put_file(str(server.folder / "000.tar"), "bucket/changed.tar")
    assert count_samples(["s3://bucket/changed.tar"], index_cache=cache) == [PER_SHARD]
    other = write_shard(tmp_path / "o.tar", {"a": GOOD})
    fs.put_file(other, "bucket/changed.tar")
    files.identity.cache_clear()
    fs.invalidate_cache()
    assert count_samples(["s3://bucket/changed.tar"], index_cache=cache) == [1]


def test_samples_are_those_of_the_files(server, tmp_path):
    urls, cache = expand_sources("s3://bucket/set/*.tar")[0], str(tmp_path / "index")
    sizes = count_samples(urls, index_cache=cache)
    local = [str(server.folder / os.path.basename(url)) for url in urls]
    for epoch, start, stop in ((0, 0, 120), (1, 50, 90)):
        here, there = (
            [(s.key, s.files) for s in ShardSource(names, sizes, 0, index_cache=cache).read(epoch, start, stop)]
            for names in (local, urls)
        )
        assert here == there
    pairs, expected = (read_shard_pairs(spec, ["caption"], "raw") for spec in ("s3://bucket/set/", str(server.folder)))
    assert pairs.captions == expected.captions and pairs.title == "set"
    assert [p.open().read() for p in pairs.image_paths] == [p.open().read() for p in expected.image_paths]
    assert len({p.resolve() for p in pairs.image_paths}) == 3 * PER_SHARD and pairs.image_paths[0].stat().st_size
    argv = ["inspect", "s3://bucket/set/", "--out", str(tmp_path / "out"), "--model", "lotlip_tiny", "--workers", "1"]
    assert prepare(argv) == 0
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["usable"] == 3 * PER_SHARD


def test_a_server_killed_in_mid_read_loses_and_repeats_nothing(server, quick, monkeypatch, caplog):
    monkeypatch.setattr("training.readers.streams.BLOCK_BYTES", 4096)  # so that much is still to be read
    waited = []

    def restart(seconds: float) -> None:
        waited.append(seconds)
        server.start()

    with monkeypatch.context() as patch:
        patch.setattr(samples, "time", SimpleNamespace(sleep=restart))
        keys = []
        for sample in read_samples("s3://bucket/set/001.tar"):
            keys.append(sample.key)
            if len(keys) == 17:
                server.kill()
    assert keys == [f"1{n:02d}" for n in range(PER_SHARD)] and waited == [0.1]
    assert caplog.text.count("trying again") == 1


def test_sizes_may_lie_anywhere(server, tmp_path):
    urls = ["pipe:cat /data/000.tar", "pipe:aws s3 cp s3://b/001.tar -", "s3://bucket/set/002.tar", "/data/003.tar"]
    sizes = {"000.tar": 3, "s3://b/001.tar": 4, "002.tar": 5, "pipe:x": 7}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    assert known_sizes(urls, str(tmp_path / "sizes.json")) == [3, 4, 5, None]
    s3fs.S3FileSystem().put_file(str(tmp_path / "sizes.json"), "bucket/sizes.json")
    assert known_sizes(urls, "s3://bucket/sizes.json") == [3, 4, 5, None]
    with pytest.raises(ValueError, match="--train-sizes .*gone.json"):
        trusted_sizes(urls, str(tmp_path / "gone.json"))


def test_a_pipe_of_unknown_size_says_what_works(tmp_path):
    with pytest.raises(ValueError, match="by their own URLs .*--train-sizes FILE .*--dataset-resampled"):
        count_samples(["pipe:cat x.tar"])
    path = write_shard(tmp_path / "0.tar", {"a": GOOD, "b": GOOD})
    assert count_samples([f"pipe:cat {path}"], run_pipes=True) == [2]
    with pytest.raises(ValueError, match="nowhere://x/0.tar"):
        count_samples(["nowhere://x/0.tar"], index_cache=str(tmp_path))


def train(folder: Path, name: str, spec: str, *flags: str) -> dict[str, torch.Tensor]:
    """Trains for two epochs of four steps; returns the weights."""
    argv = [*SMALL_LOTLIP, "--train-data", spec, "--captions", "raw", "--batch-size", "10", "--warmup", "0"]
    argv += ["--epochs", "2", "--workers", "0", "--device", "cpu", "--logs", str(folder), "--name", name, *flags]
    assert main(argv) == 0
    return torch.load(folder / name / "checkpoints" / "epoch_2.pt", weights_only=True)["state_dict"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_training_on_object_storage_is_resumed_bit_for_bit(server, tmp_path):
    spec = "s3://bucket/set/{000..001}.tar"
    cache = ["--index-cache", str(tmp_path / "index")]
    whole = train(tmp_path, "whole", spec, *cache)
    half = str(tmp_path / "whole" / "checkpoints" / "epoch_1.pt")
    assert equal(train(tmp_path, "resumed", spec, *cache, "--resume", half), whole)
    assert equal(train(tmp_path, "local", f"{server.folder}/{{000..001}}.tar"), whole)


def test_pipes_are_trained_on_and_validated_as_the_files_are(server, tmp_path):
    """The lines of open_clip's README: a command with braces, with the number of samples, and no sizes.json."""
    pipe = f"pipe:cat {server.folder}/{{000..001}}.tar"
    flags = ["--val-data", f"pipe:cat {server.folder}/002.tar", "--val-frequency", "1"]
    train(tmp_path, "drawn", pipe, *flags, "--train-num-samples", "40")
    lines = [json.loads(line) for line in (tmp_path / "drawn" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val/num_samples"] for line in lines if "val/num_samples" in line] == [PER_SHARD] * 2
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": PER_SHARD, "001.tar": PER_SHARD}))
    sizes = ["--train-sizes", str(tmp_path / "sizes.json")]
    assert equal(train(tmp_path, "each", pipe, *sizes), train(tmp_path, "l", f"{server.folder}/{{000..001}}.tar"))
