"""Files of an evaluation: numbers are shown first, lines are whole, names need not be UTF-8, runs do not mix."""

import argparse
import io
import json
import resource
import signal
import tarfile
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import training.eval.run
from eval_files import write_image
from support import end_ranks, free_ports, set_rank, start_ranks
from training import results
from training.eval.results import write_results
from training.main import main
from training.runtime.files import append_line
from training.runtime.lease import Lease
from training.runtime.messages import printable


@pytest.fixture
def argv(tmp_path, tiny_clip) -> list[str]:
    root = tmp_path / "Urban1k"
    (root / "caption").mkdir(parents=True)
    for number in range(4):
        write_image(root / "image" / f"{number}.jpg", number)
        (root / "caption" / f"{number}.txt").write_text(f"Street {number}.")
    flags = ["--model", tiny_clip, "--urban1k-retrieval", str(root), "--device", "cpu", "--workers", "0"]
    return [*flags, "--logs", str(tmp_path / "logs"), "--name", "run"]


def test_files_that_cannot_be_written_cost_warnings_after_the_numbers(argv, tmp_path, capsys, caplog):
    folder = tmp_path / "logs" / "run"
    for name in (
        "checkpoints/results.jsonl",
        "ranks.npz",
        "report.html",
        "long_text_card.png",
        "features/urban1k-retrieval.npz",
    ):
        (folder / name / "occupied").mkdir(parents=True)
    assert main([*argv, "--report", "--save-features", "--diagnostics"]) == 0
    said = capsys.readouterr().out
    assert "R@1" in said and "Recall with changed captions" in said
    for what in ("results.jsonl", "ranks.npz", "--report", "--save-features"):
        assert f"{what} could not be written" in caplog.text
    assert "Results:" not in said and "Report:" not in said and "Features:" not in said


def test_names_that_are_not_utf8_end_no_evaluation(argv, tmp_path, capfd):
    path = tmp_path / "t\u2028.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (("caf\xe9.jpg", write_image(tmp_path / "a.jpg", 0).read_bytes()), ("caf\xe9.txt", b"a")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    own = ["--retrieval-wds", str(path), "--report", "--feature-cache", str(tmp_path / "cache"), "--diagnostics"]
    assert main([*argv, *own]) == 0
    assert main([*argv, *own]) == 0
    loaded = results.load(tmp_path / "logs")
    assert len(loaded) == 4 and set(loaded["--retrieval-wds"]) == {str(path)}
    assert (tmp_path / "logs" / "run" / "report.html").is_file()
    args = argparse.Namespace(features=[], model="m", pretrained=None, precision="fp32", retrieval_csv="caf\udce9.csv")
    write_results([], tmp_path / "more", args, None, {})
    (line,) = (tmp_path / "more" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["flags"]["retrieval_csv"] == "caf\udce9.csv"
    assert printable(Path("caf\udce9.csv")) == "caf\\udce9.csv"


def test_a_line_is_whole_after_half_a_line_and_among_several_writers(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"half":')

    def write(number: int) -> None:
        for line in range(50):
            append_line(path, json.dumps([number, line, "x" * 10_000]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half, *lines = path.read_text().splitlines()
    expected = [[number, line] for number in range(4) for line in range(50)]
    assert half == '{"half":' and sorted(json.loads(line)[:2] for line in lines) == expected


def test_a_full_disk_leaves_no_half_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, "first")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    append_line(path, "last")
    assert path.read_text() == "first\nlast\n"


def test_two_evaluations_with_one_name_do_not_mix(argv, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "logs" / "run"
    with Lease() as lease:
        lease.take(folder / "checkpoints", "--name run")
        assert main(argv) == 2 and "is in use by process" in capsys.readouterr().err
        monkeypatch.setattr(training.eval.run, "run_name", lambda *parts: "run")  # two jobs of the same second
        assert main(argv[:-2]) == 0
        assert not (folder / "checkpoints" / "results.jsonl").exists()
        assert (tmp_path / "logs" / "run-2" / "checkpoints" / "results.jsonl").is_file()
    assert main(argv) == 0


def check_timeout(rank: int, argv: list[str], port: int) -> None:
    set_rank(rank, 2, port)
    found = []
    measure = training.eval.run._measure

    def look(*args: object) -> object:
        found.append(dist.group.WORLD._get_backend(args[2].device).options._timeout.total_seconds())
        return measure(*args)

    training.eval.run._measure = look
    assert main(argv) == 0 and found == [33 * 60], found


def test_the_timeout_applies_to_evaluations(argv):
    """Collectives wait five minutes longer than four times the flag's value, so that a watchdog speaks first."""
    flags = [*argv, "--timeout-minutes", "7"]
    assert end_ranks(start_ranks(check_timeout, 2, flags, free_ports(1)[0])) == [0, 0]
