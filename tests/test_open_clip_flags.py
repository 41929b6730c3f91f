"""Flags of open_clip's trainer: each is recognised, documented launch lines are accepted, supported flags work."""

import csv
import importlib.metadata
import json
import re
import shlex

import pytest
import torch
from open_clip_train import params
from open_clip_train.scheduler import const_lr_cooldown
from PIL import Image

from training.flags.parser import UsageError, build_parser, parse_args
from training.main import main
from training.train.optim import make_optimizer, make_schedule, parameter_groups


def test_every_flag_of_open_clip_is_known(capsys):
    with pytest.raises(SystemExit):
        params.parse_args(["--help"])
    theirs = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(theirs) == 90
    assert theirs <= build_parser().actions.keys()


def documented_lines() -> list[str]:
    """Returns the launch lines in the installed open_clip's README, without the program."""
    metadata = importlib.metadata.metadata("open_clip_torch")
    text = re.sub(r"\\[ \t]*\n", " ", metadata["Description"] or metadata.get_payload())
    return re.findall(r"open_clip_train(?:\.main|/main\.py)\s+(--[^`\n]*)$", text, re.MULTILINE)


def test_documented_launch_lines_are_read():
    lines = documented_lines()
    assert len(lines) == 8
    for line in lines:
        words = shlex.split(line, comments=True)
        if "coca" in line:
            with pytest.raises(UsageError, match="CoCa is not trained here"):
                build_parser().parse_args(words)
        else:
            build_parser().parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--force-image-size", "224", "224"], "--model-config"),
        (["--horovod"], "torchrun"),
        (["--distill-model", "ViT-B-32"], "open_clip_train.main"),
        (["--use_bnb_linear", "SwitchBackLinearGlobal"], "--precision amp_bf16"),
        (["--lr-scheduler", "const-cooldown"], "expected --epochs-cooldown from 1 to --epochs 10, found None"),
        (["--opt", "sgd"], "expected adamw or timm/NAME, found 'sgd'"),
    ],
)
def test_messages_of_unsupported_flags_say_what_to_do(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--train-data", "data.tar", *words])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_a_flag_that_changes_nothing_is_reported_once(capsys):
    args = parse_args(["--train-data", "data.tar", "--val_num_samples", "10", "--ddp-static-graph"])
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"warning: (--\S+): no effect: ", line)[1] for line in lines] == [
        "--val-num-samples",
        "--ddp-static-graph",
    ]
    assert args == parse_args(["--train-data", "data.tar"])


def test_cooldown_is_that_of_open_clip():
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0) for _ in range(2))
    ours.param_groups[0]["lr_scale"] = 1.0
    schedule = make_schedule(ours, "const-cooldown", 1e-3, 3, 20, 5, 2.0, 1e-5)
    expected = const_lr_cooldown(theirs, 1e-3, 3, 20, 5, 2.0, 1e-5)
    for step in range(20):
        assert schedule(step) == expected(step)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


@pytest.mark.parametrize("model_name", ["ViT-S-32-alt", "long_clip-ViT-B-32"])
def test_timms_optimizers_decay_what_they_decay_in_open_clips_trainer(model_name):
    import timm.optim

    import training

    model = training.create_model(model_name, pretrained_text=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(groups: list[dict]) -> set[str]:
        return {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}

    # The same call as in open_clip_train.main.
    theirs = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.5)
    ours = decayed(parameter_groups(model, 0.1, 0.5, None, None, timm_rule=True))
    assert ours == decayed(theirs.param_groups)
    adamw = decayed(parameter_groups(model, 0.1, 0.5, None, None))
    assert "visual.positional_embedding" in adamw - ours


def test_optimizers_of_timm():
    """Compares with SGD by hand: momentum is passed to timm, and each group keeps its own rate and decay."""
    first, second = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    groups = [
        {"params": [first], "lr": 0.1, "weight_decay": 0.5, "lr_scale": 1.0},
        {"params": [second], "lr": 0.01, "weight_decay": 0.0, "lr_scale": 0.1},
    ]
    optimizer = make_optimizer(groups, "timm/momentum", 0.1, (0.9, 0.98), 1e-6, momentum=0.5)
    for parameter in (first, second):
        parameter.grad = torch.tensor([1.0])
    optimizer.step()
    assert first.item() == pytest.approx(2 - 0.1 * (1 + 0.5 * 2)) and second.item() == pytest.approx(2 - 0.01)
    optimizer.step()  # the buffers hold 0.5 x the last gradient, including weight decay
    assert first.item() == pytest.approx(1.8 - 0.1 * (0.5 * 2 + 1 + 0.5 * 1.8))
    assert second.item() == pytest.approx(1.99 - 0.01 * 1.5)
    with pytest.raises(ValueError, match="--opt timm/nowhere: unknown to timm; it has .*adamw"):
        make_optimizer(groups, "timm/nowhere", 0.1, (0.9, 0.98), 1e-6)


@pytest.fixture
def table(tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for number in range(8):
            Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
            writer.writerow([tmp_path / f"{number}.png", f"a square of redness {number}"])
    return tmp_path / "pairs.csv"


def test_a_launch_line_of_open_clip_trains(table, tmp_path, capsys):
    line = (
        f"--dataset-type csv --train-data {table} --csv-img-key filepath --csv-caption-key title --warmup 1 "
        "--batch-size 4 --lr 1e-3 --wd 0.1 --epochs 3 --workers 0 --model lotlip_tiny --opt timm/lion "
        f"--lr-scheduler const-cooldown --epochs-cooldown 1 --logs {tmp_path} --name run --save-frequency 0 "
        "--log-every-n-steps 1 --device cpu --wandb-project-name open-clip"
    )
    assert main([*line.split(), "--csv-separator", "\t", "--no-pretrained-text"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert rates == pytest.approx([1e-3] * 5 + [5e-4])
    assert (
        main(
            [
                *line.replace("type csv", "type webdataset").replace("--name run", "--name other").split(),
                "--csv-separator",
                "\t",
            ]
        )
        == 2
    )
    assert "--dataset-type webdataset: --train-data" in capsys.readouterr().err


def test_skip_scheduler_has_no_warmup(table, tmp_path):
    line = f"--train-data {table} --csv-caption-key title --batch-size 4 --epochs 1 --workers 0 --model lotlip_tiny"
    line += f" --skip-scheduler --lr 2e-3 --logs {tmp_path} --name run --log-every-n-steps 1 --save-frequency 0"
    assert main([*line.split(), "--csv-separator", "\t", "--no-pretrained-text", "--device", "cpu"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/lr"] for row in rows if "train/lr" in row] == [2e-3, 2e-3]
