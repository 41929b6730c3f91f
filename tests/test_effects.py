"""For all flags of the parser: a flag without effect is reported once, a flag with an effect never."""

import argparse
import ast
from pathlib import Path

import pytest

from training.flags.effects import Condition, idle_flags
from training.flags.parser import build_parser, parse_args
from training.flags.table import declared
from training.flags.types import Switch

ROOT = Path(__file__).parents[1]
PARSER = build_parser()
ACTIONS = [a for a in dict.fromkeys(PARSER.actions.values()) if a.dest not in (argparse.SUPPRESS, "config")]
EVALUATION, TRAINING = ["--dci-retrieval", "D"], ["--train-data", "d.tar"]
COMMANDS = [
    EVALUATION,
    TRAINING,
    ["--features", "x.npz"],
    ["--train-data", "t.csv", "--val-data", "v.csv", "--urban1k-retrieval", "U"],
    [*TRAINING, "--extract-image-features", "D"],
    [*TRAINING, "--save-every-minutes", "0"],
    [*TRAINING, "--save-frequency", "0"],
    [*TRAINING, "--lr-scheduler", "const-cooldown", "--opt", "timm/lion"],
    [*TRAINING, "--skip-scheduler"],
    [*TRAINING, "--lock-image", "--lock-text", "--dataset-resampled", "--train-num-samples", "9"],
    [*TRAINING, "--remote-sync", "s3://bucket"],
    [*TRAINING, "--captions", "raw"],
    [*TRAINING, "--long-text-variance", "0.9"],
    [*TRAINING, "--text-views", "long"],
    [*TRAINING, "--dry-run"],
    [*TRAINING, "--resume", "latest", "--experiment", "e.py"],
    [*TRAINING, "--text-views", "short, sentences*2"],
    ["--retrieval-csv", "p.csv", "--iiw-retrieval", "D", "--docci-retrieval", "D", "--share4v-retrieval", "D"],
    ["--coco-retrieval", "D", "--flickr30k-retrieval", "D"],
    ["--data-root", "D", "--dci-retrieval", "D"],
    ["--retrieval-wds", "w.tar"],
    ["--imagenet-val", "D"],
    ["--features", "x.npz", "--pretrained", "w.pt", "--diagnostics"],
]


def words(action: argparse.Action) -> list[str]:
    """Returns a flag with a value that is not its default."""
    if isinstance(action, Switch):
        return [action.negatives[0] if action.default else action.option_strings[0]]
    choices = [choice for choice in action.choices or () if choice != action.default]
    for value in (*choices[:1], "7", "a=1", "raw", "timm/lion"):
        try:
            given = getattr(PARSER.parse_args([action.option_strings[0], value]), action.dest)
        except ValueError:
            continue
        if given != action.default:
            return [action.option_strings[0], value]
    raise AssertionError(f"no value for {action.option_strings[0]}")


def reports(argv: list[str]) -> list[str]:
    """Returns all flags of a command that are reported."""
    idle = idle_flags(PARSER.parse_args(argv), vars(PARSER.parse_args([])), PARSER.effects)
    return [flag for flags in idle.values() for flag in flags]


def test_every_flag_says_when_it_has_an_effect():
    assert PARSER.effects.keys() - {"--config"} == {action.option_strings[0] for action in ACTIONS}
    for title, flags in declared().items():
        for names, fields in flags.items():
            if names != "benchmarks" and fields.get("kind") not in ("calls", "refused", "renamed", "no-effect"):
                assert fields["effect"], f"{title}: {names}"


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.option_strings[0])
def test_a_flag_is_reported_where_it_has_no_effect_and_only_there(action):
    flag = action.option_strings[0]
    found = [reports([*command, *words(action)]) for command in COMMANDS]
    assert all(flags.count(flag) <= 1 for flags in found)
    with_effect = [flag not in flags for flags in found]
    conditions = [condition for condition in PARSER.effects[flag] if condition.otherwise]
    assert any(with_effect)
    # --train-data makes a command a training, so it always has an effect.
    assert all(with_effect) == (not conditions or flag == "--train-data")


def readers() -> dict[str, set[str]]:
    """Returns flag -> files that read it, except files that only check it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                if path.parent.name not in ("flags", "prepare"):
                    found.setdefault(node.attr, set()).add(str(path.relative_to(ROOT / "src" / "training")))
    return found


def test_declarations_agree_with_the_code_that_reads_the_flags():
    places = readers()
    checked = 0
    for action in ACTIONS:
        flag, files = action.option_strings[0], places.get(action.dest, set())
        if files and all(file.startswith("train/") for file in files) and flag != "--train-data":
            assert flag in reports([*EVALUATION, *words(action)]), f"{flag} is read by {files} only"
            checked += 1
        if files == {"eval/run.py"}:
            assert flag in reports([*TRAINING, *words(action)]), f"{flag} is read by {files} only"
            checked += 1
    assert checked > 25


def test_the_report_is_one_line_on_rank_0(monkeypatch, capsys):
    argv = [*EVALUATION, "--warmup", "10", "--lr", "1e-3", "--epochs", "10"]
    parse_args(argv)
    assert capsys.readouterr().err == (
        "python -m training.main: warning: --lr, --warmup: no effect without --train-data\n"
    )
    monkeypatch.setenv("RANK", "1")
    parse_args(argv)
    assert capsys.readouterr().err == ""


def test_conditions_look_into_files_only_for_flags_that_were_given():
    looked = []
    condition = Condition("without a table", lambda args: looked.append(args))
    effects = {"--csv-separator": (condition,), "--csv-img-key": (condition,)}
    args = argparse.Namespace(csv_separator=None, csv_img_key="filepath")
    defaults = {"csv_separator": None, "csv_img_key": "filepath"}
    assert idle_flags(args, defaults, effects) == {} and not looked
    args.csv_separator, args.csv_img_key = ";", "image"
    assert idle_flags(args, defaults, effects) == {condition: ["--csv-separator", "--csv-img-key"]}
    assert looked == [args]
