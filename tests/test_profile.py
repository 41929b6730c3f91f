"""--profile records the operations of a step."""

import gzip
import json
import re

import torch
from test_safety import command

from training.main import main
from training.train.step_log import StepProfile


def test_profile_writes_a_trace_of_five_steps_and_a_table(scenes, tmp_path):
    folder = tmp_path / "profile"
    assert main(command(scenes, tmp_path, "run", "--profile", str(folder))) == 0
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    for part in ("wait for data", "forward", "loss", "backward", "update"):
        assert names.count(part) == 5, part
    table = (folder / "table.txt").read_text()
    rows = table.split("Self CPU %")[1].split("-" * 20)
    # Which operations are among the ten longest operations of so small a model differs between runs.
    assert re.search(r"aten::\w+ ", table) and "Self CPU time total" in table
    assert 10 <= sum("%" in line for line in "".join(rows).splitlines()) <= 11
    assert table in (tmp_path / "run" / "out.log").read_text()
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "table.txt"}


def test_a_run_without_enough_steps_says_that_nothing_is_recorded(tmp_path, caplog):
    with StepProfile(tmp_path, torch.device("cpu")) as profile:
        for _ in range(3):
            profile.step()
    assert "ended before step 11" in caplog.text and not list(tmp_path.iterdir())
