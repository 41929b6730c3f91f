"""The commands' flags: --help imports little, every flag has help and is used; the guide's commands exist."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training.prepare.__main__ import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("words", [[], ["recaption"]])
def test_help_loads_nothing_heavy(words):
    code = f"""
import atexit, runpy, sys
heavy = ("torch", "open_clip", "transformers", "pyarrow", "numpy", "webdataset", "ftfy", "PIL")
atexit.register(lambda: print("heavy:", [m for m in heavy if m in sys.modules]))
sys.argv = ["-m", *{words}, "--help"]
import training
runpy.run_module("training.prepare", run_name="__main__", alter_sys=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_flag_has_help_and_is_read():
    read = set()
    for path in (ROOT / "src" / "training" / "prepare").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                read.add(node.attr)
    assert set(subparsers()) == set(COMMANDS)
    for name, parser in subparsers().items():
        for action in parser._actions:
            assert action.help, (name, action.dest)
            assert action.dest in read | {"help"}, f"{name} {action.option_strings} is read by nobody"


def test_commands_in_the_guide_are_accepted():
    text = (ROOT / "TRAIN_DATASETS.md").read_text() + (ROOT / "README.md").read_text() + build_parser().description
    commands = re.findall(r"python -m (training\.prepare [a-z](?:.|\\\n)*?)(?:\n(?!  )|`|$)", text)
    seen = set()
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "), comments=True)[1:]
        if len(words) == 1:
            continue  # a name in a sentence
        words = words[: words.index("&&")] if "&&" in words else words
        build_parser().parse_args(words)
        seen.add(words[0])
    assert seen == set(COMMANDS)


HANGS = """
import sys, threading
import training.prepare.inspect, training.prepare.__main__ as prepare, training.search.__main__ as search
hang = lambda *_: threading.Event().wait()  # like a read from storage that no longer answers
training.prepare.inspect.run = search._check = hang
sys.exit({"prepare": prepare, "search": search}[sys.argv[1]].main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "words", [["prepare", "inspect", "0.tar", "--out", "out"], ["search", "images", "--index", "i", "--model", "m"]]
)
def test_a_command_that_hangs_ends_and_says_so(words):
    command = [sys.executable, "-c", HANGS, *words, "--timeout-minutes", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 70, done
    assert "error: nothing was done for 0.02 minutes (--timeout-minutes)" in done.stderr
