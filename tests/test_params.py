"""The command line: both spellings of flags, clear errors with exit code 2, and no unused flag."""

import argparse
import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dataloaders.registry import benchmarks, destination
from training.data.captions import CaptionRule
from training.data.images import MODES
from training.flags.model import OF_MODEL, OF_TOKENIZER
from training.flags.parser import build_parser, parse_args
from training.loss.caption_loss import NORMALISATIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmarks/*.md"))]


def test_hyphens_and_underscores_are_the_same():
    first = parse_args(
        ["--share4v-retrieval", "D", "--share4v-anno", "F", "--share4v-val-num", "5,1000", "--batch-size=3"]
    )
    second = parse_args(
        ["--share4v_retrieval", "D", "--share4v_anno", "F", "--share4v_val_num=5,1000", "--batch_size", "3"]
    )
    assert vars(first) == vars(second) and first.share4v_val_num == (5, 1000)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "nothing to do"),
        (["--dci-retrieval"], "expected one argument"),
        (["--dci-retrieva", "D"], "unrecognized arguments"),
        (["--share4v-retrieval", "D"], "needs --share4v-anno"),
        (["--share4v-retrieval", "D", "--share4v-anno", "F", "--share4v_val_num", "0"], "whole number of at least 1"),
        (["--share4v-retrieval", "D", "--share4v-anno", "F", "--share4v_val_num", "10,,2"], "found ''"),
        (["--dci-retrieval", "D", "--iiw-anno", "F"], "no effect without --iiw-retrieval"),
        (["--dci-retrieval", "D", "--batch-size", "0"], "at least 1, found '0'"),
        (["--dci-retrieval", "D", "--workers", "many"], "found 'many'"),
        (["--dci-retrieval", "D", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--dci-retrieval", "D", "--model", "local-dir:X", "--pretrained", "y"], "has its own weights"),
        (["--dci-retrieval", "D", "--name", "a/b"], "expected a single folder name"),
        (["--dci-retrieval", "D", "--logs", __file__], "is a file"),
    ],
)
def test_usage_errors_exit_2_with_one_message(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in message and message.count("error:") == 1


def test_help_is_grouped_and_loads_nothing_heavy():
    for module in (
        "training.main",
        "training.compare",
        "training.corner_view",
        "dataloaders.scenes",
        "dataloaders.prepare",
    ):
        code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("heavy:", [m for m in ("torch", "open_clip", "transformers") if m in sys.modules]))
sys.argv = ["", "--help"]
runpy.run_module("{module}", run_name="__main__")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "heavy: []", module
    headings = [group.title for group in build_parser()._action_groups if group._group_actions]
    assert len(headings) >= 4


def test_every_flag_has_help_and_a_reader():
    read = {"config", "print_config"}  # by the parser itself
    read |= {*OF_TOKENIZER, *OF_MODEL}  # as arguments of the functions that make a model
    read |= {field.name for field in fields(CaptionRule)}
    for benchmark in benchmarks():
        read |= {destination(flag) for flag in (benchmark.flag, *benchmark.arguments.values())}
    for path in [*(ROOT / "src" / "training").rglob("*.py"), *(ROOT / "dataloaders").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)  # flags as a dict
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                # Code that only checks a flag doesn't count as using it.
                if path.parent.name != "flags" and not path.name.startswith("params"):
                    read.add(node.attr)
    for action in build_parser()._actions:
        assert action.help, action.option_strings
        if action.dest != argparse.SUPPRESS:  # --help, and refused flags
            assert action.dest in read, f"{action.option_strings} is read by nobody"


def test_choices_are_those_of_the_code_that_reads_them():
    actions = build_parser().actions
    assert actions["--loss-normalisation"].choices == list(NORMALISATIONS)
    assert actions["--image-decoding"].choices == list(MODES)
    for flag, action in actions.items():
        assert not action.choices or action.default in (None, *action.choices), flag


def test_help_is_shorter_than_help_all():
    assert len(build_parser(everything=False).actions) < 0.7 * len(build_parser().actions)
    for flag in ("--train-data", "--model", "--config", "--help-all", "--urban1k-retrieval", "--resume"):
        assert flag in build_parser(everything=False).actions


def test_flags_in_the_documents_exist():
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    for path in DOCUMENTS:
        text = path.read_text()
        for command in re.findall(r"python -m training\.main((?:.|\\\n)*?)(?:\n\n|`)", text):
            for flag in re.findall(r"--[a-z0-9_-]+", command):
                assert flag.replace("_", "-") in known, f"{path}: {flag}"


def test_links_and_anchors_in_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"https?://", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file) if file else path
            assert there.exists(), f"{path}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{path}: {target}"


def test_lines_of_documents_have_at_most_160_characters():
    for path in DOCUMENTS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 160, f"{path}:{number}"
