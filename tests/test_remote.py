"""--remote-sync: the copy at the URL is consistent at any moment, and another machine continues from it."""

import argparse
import json
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from test_safety import command, metrics, steps  # noqa: F401

from training.main import main
from training.train.checkpoint import load_checkpoint
from training.train.remote import RemoteCopy

KEPT = ["--epochs", "2", "--save-every-steps", "4", "--keep-checkpoints", "1"]


def whole_checkpoints(remote: Path) -> dict[str, list[int]]:
    """Returns the index; asserts that every checkpoint in it can be loaded and has the number of steps in the index."""
    index = json.loads((remote / "checkpoints.json").read_text())
    for name, (epoch, step, size) in index.items():
        content = load_checkpoint(remote / name)
        assert (content["epoch"], content["step"], (remote / name).stat().st_size) == (epoch, step, size)
    return index


@pytest.fixture(scope="module")
def quiet(scenes, tmp_path_factory) -> Path:
    """Trains without interruption, with a copy."""
    logs = tmp_path_factory.mktemp("quiet")
    assert main(command(scenes, logs, "run", *KEPT, "--remote-sync", "memory://bucket/runs")) == 0
    return logs / "run"


def test_the_copy_is_the_folder(quiet):
    memory = fsspec.filesystem("memory")
    local = {str(p.relative_to(quiet)): p for p in quiet.rglob("*") if p.is_file()}
    there = {path.removeprefix("/bucket/runs/run/"): path for path in memory.find("/bucket/runs/run")}
    assert there.keys() == local.keys() | {"checkpoints.json"}
    assert {"checkpoints/epoch_2.pt", "metrics.jsonl", "params.json", "out.log"} < there.keys()
    for name, path in local.items():
        assert memory.cat_file(there[name]) == path.read_bytes(), name
    memory.rm("/bucket", recursive=True)


def test_another_machine_continues_from_the_copy(scenes, quiet, tmp_path, steps):  # noqa: F811
    remote = tmp_path / "remote"
    flags = [*KEPT, "--remote-sync", f"file://{remote}", "--resume", "latest"]
    steps["stop"] = 13
    assert main(command(scenes, tmp_path / "first", "run", *flags)) == 75
    assert "checkpoints/step_13.pt" in whole_checkpoints(remote / "run")
    steps.clear()
    assert main(command(scenes, tmp_path / "second", "run", *flags)) == 0
    log = (tmp_path / "second" / "run" / "out.log").read_text()
    assert f"fetched checkpoints/step_13.pt and the logs from file://{remote}/run" in log
    assert metrics(tmp_path / "second" / "run")[:13] == metrics(tmp_path / "first" / "run")[:13]
    expected, got = (
        torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True)["state_dict"]
        for run in (quiet, tmp_path / "second" / "run")
    )
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert set(whole_checkpoints(remote / "run")) == {"checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt"}
    assert sorted(p.name for p in (remote / "run" / "checkpoints").glob("*.pt")) == ["epoch_1.pt", "epoch_2.pt"]


def test_a_damaged_copy_is_skipped(scenes, tmp_path):
    remote = tmp_path / "remote"
    flags = ["--epochs", "2", "--remote-sync", f"file://{remote}", "--resume", "latest"]
    assert main(command(scenes, tmp_path / "first", "run", *flags)) == 0
    damaged = bytearray((remote / "run" / "checkpoints" / "epoch_2.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (remote / "run" / "checkpoints" / "epoch_2.pt").write_bytes(damaged)
    assert main(command(scenes, tmp_path / "second", "run", *flags)) == 0
    assert "fetched checkpoints/epoch_1.pt" in (tmp_path / "second" / "run" / "out.log").read_text()
    whole_checkpoints(remote / "run")


def test_training_continues_while_nothing_can_be_copied(scenes, tmp_path, monkeypatch, capsys):
    """The target is full or unreachable after half of each file: exit code 1 at the end, no partial file is listed."""
    remote = tmp_path / "remote"
    flags = ["--epochs", "2", "--remote-sync", f"file://{remote}"]
    put = LocalFileSystem.put_file

    def cut_off(self: LocalFileSystem, source: str, target: str, **more: object) -> None:
        if "epoch_1" in source:
            return put(self, source, target, **more)
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "put_file", cut_off)
        assert main(command(scenes, tmp_path / "first", "run", *flags)) == 1
    assert "--remote-sync" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "first" / "run" / "checkpoints" / "epoch_2.pt").is_file()
    assert set(whole_checkpoints(remote / "run")) <= {"checkpoints/epoch_1.pt"}
    assert not list(remote.rglob("*.tmp"))
    assert main(command(scenes, tmp_path / "first", "run", *flags, "--resume", "latest")) == 0
    assert len(whole_checkpoints(remote / "run")) == 2


def test_an_error_does_not_wait_for_storage_that_hangs(tmp_path, monkeypatch, caplog):
    """The other ranks would wait, and nobody would see the error."""
    hanging, finished = threading.Event(), []
    monkeypatch.setattr("training.train.remote.LAST_COPY_S", 0.2)
    monkeypatch.setattr(LocalFileSystem, "put_file", lambda *_, **__: finished.append(hanging.wait(60)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out.log").write_text("")
    flags = {"remote_sync": f"file://{tmp_path / 'remote'}", "remote_sync_frequency": 300}
    args = argparse.Namespace(**flags, delete_previous_checkpoint=False)
    with pytest.raises(MemoryError), RemoteCopy(args, tmp_path / "run"):
        raise MemoryError("out of memory")
    assert not finished and "out of memory; waiting up to 0.2 s" in caplog.text
    hanging.set()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--remote-sync", "nowhere://bucket"], "--remote-sync nowhere://bucket: can't be used (Protocol not known"),
        (["--logs", "s3://bucket"], "--logs s3://bucket: expected a local path; --remote-sync URL"),
        (["--resume", "s3://bucket/epoch_1.pt"], "--resume s3://bucket/epoch_1.pt: expected a local path"),
    ],
)
def test_urls_that_cannot_be_used_end_the_command(flags, message, scenes, tmp_path, capsys):
    try:
        code = main(command(scenes, tmp_path, "run", *flags))
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_name_that_is_taken_there_is_refused(scenes, tmp_path, capsys):
    flags = ["--epochs", "1", "--remote-sync", f"file://{tmp_path / 'remote'}"]
    assert main(command(scenes, tmp_path / "first", "run", *flags)) == 0
    assert main(command(scenes, tmp_path / "second", "run", *flags)) == 2
    assert "/remote/run contains checkpoints; add --resume latest" in capsys.readouterr().err
