"""A process that was started alone, or without the address of other processes, doesn't wait for them."""

import pytest

from support import read_results
from training.main import main

NAMES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def run(scenes, tmp_path, monkeypatch, capsys):
    def run(environ: dict[str, str]) -> tuple[int, str]:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", "--model", "lotlip_tiny", "--workers", "0"]
        code = main([*argv, "--logs", str(tmp_path), "--name", "r", "--device", "cpu"])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"},
    ],
)
def test_a_process_started_alone_runs_alone_and_warns(environ, run, tmp_path):
    code, said = run(environ)
    assert code == 0 and "it runs as one process" in said
    assert read_results(tmp_path, "r")["world_size"] == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
    ],
)
def test_processes_that_cannot_meet_end_at_once(environ, run):
    code, said = run(environ)
    assert code == 2 and "MASTER_ADDR" in said and said.count("\n") == 1
