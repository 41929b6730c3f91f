"""Flags of open_clip's trainer: each is recognised, documented launch lines are accepted, supported flags work."""

import csv
import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from open_clip_train import params
from open_clip_train.scheduler import const_lr_cooldown
from PIL import Image

from training.data.images import parse_augmentation
from training.export.__main__ import main as export
from training.flags.parser import build_parser, parse_args
from training.main import main
from training.train.optim import make_optimizer, make_schedule, parameter_groups


def test_every_flag_of_open_clip_is_known(capsys):
    with pytest.raises(SystemExit):
        params.parse_args(["--help"])
    theirs = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(theirs) == 90
    assert theirs <= build_parser().actions.keys()


def launch_lines() -> dict[str, list[str]]:
    """Returns the words of the launch lines that open_clip documents, by their names in the file."""
    text = (Path(__file__).parent / "reference" / "open_clip_launch_lines.txt").read_text()
    rows = (line.split(" | ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: shlex.split(words) for name, words in rows}


LINES = launch_lines()
REFUSED = {"README: CoCa": "CoCa is not trained here", "scripts: CLIPA-v2 evaluation": "--square-resize-only"}
BY_MODEL = {"tests: CoCa"}  # read, and refused when the model is built


def test_the_lines_of_the_readme_are_those_of_the_installed_version():
    metadata = importlib.metadata.metadata("open_clip_torch")
    text = re.sub(r"\\[ \t]*\n", " ", metadata["Description"] or metadata.get_payload())
    found = re.findall(r"open_clip_train(?:\.main|/main\.py)\s+(--[^`\n]*)$", text, re.MULTILINE)
    names = [name for name in LINES if name.startswith("README")]
    assert len(found) == 8  # one line stands twice in our list: on one node and on several
    assert all(shlex.split(line, comments=True) in [LINES[name] for name in names] for line in found)


@pytest.mark.parametrize("name", LINES)
def test_a_documented_launch_line_means_the_same(name, capsys):
    """Every flag in a line has the value that open_clip's own parser gives it."""
    if name in REFUSED:
        with pytest.raises(SystemExit):
            parse_args(LINES[name])
        assert REFUSED[name] in capsys.readouterr().err
        return
    ours, words = vars(parse_args(LINES[name])), LINES[name]
    theirs = vars(params.parse_args([str(int(float(word))) if word == "4e8" else word for word in words]))
    given = {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    warned = {flag[2:].replace("-", "_") for flag in re.findall(r"(--\S+): no effect", capsys.readouterr().err)}
    for key in given - warned:
        value = theirs[key]
        if key == "csv_caption_key":
            assert (ours["raw_caption_keys"], ours["captions"]) == ((value,), "raw")
        elif key == "aug_cfg":
            assert parse_augmentation(ours[key]) == value
        else:
            assert (",".join(ours[key]) if key == "report_to" else ours[key]) == value, key
    assert warned <= {"ddp_static_graph", "val_num_samples"}


def test_at_least_24_of_the_documented_lines_mean_the_same():
    assert len(LINES) == 27 and len(LINES.keys() - REFUSED.keys() - BY_MODEL) == 24


def test_defaults_that_differ_are_written_down():
    ours, theirs = vars(parse_args(["--train-data", "d.tar"])), vars(params.parse_args(["--train-data", "d.tar"]))
    theirs |= {"pretrained": None, "report_to": (), "logs": "logs", "aug_cfg": [], "momentum": None, "beta2": 0.98}
    theirs |= {"torchcompile": None, "eps": 1e-6}  # eps: of vision transformers; the model's name decides in open_clip
    differ = {f"--{key.replace('_', '-')}" for key, value in theirs.items() if key in ours and ours[key] != value}
    docs = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    named = docs.split("Different defaults:")[1].split("\n\n")[0]
    assert differ == set(re.findall(r"`(--[a-z-]+)`", named)) - {"--beta2", "--eps", "--csv-caption-key"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--force-image-size", "224", "224", "3"], "--force-image-size: expected 1 or 2 numbers, found 3"),
        (["--image-mean", "0.5", "0.5"], "--image-mean: expected 1 or 3 numbers, found 2"),
        (["--force-patch-dropout", "1"], "--force-patch-dropout 1: expected at least 0 and less than 1"),
        (["--context-length", "100", "--force-context-length", "100"], "exclude each other"),
        (["--horovod"], "torchrun"),
        (["--distill-model", "ViT-B-32"], "use --experiment examples/distillation.py, whose flag --teacher"),
        (["--coca-contrastive-loss-weight", "1"], "open_clip_train.main"),
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
    assert "of type csv, not --dataset-type webdataset; use auto" in capsys.readouterr().err


def test_skip_scheduler_has_no_warmup(table, tmp_path):
    line = f"--train-data {table} --csv-caption-key title --batch-size 4 --epochs 1 --workers 0 --model lotlip_tiny"
    line += f" --skip-scheduler --lr 2e-3 --logs {tmp_path} --name run --log-every-n-steps 1 --save-frequency 0"
    assert main([*line.split(), "--csv-separator", "\t", "--no-pretrained-text", "--device", "cpu"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/lr"] for row in rows if "train/lr" in row] == [2e-3, 2e-3]


def test_a_changed_model_is_trained_saved_and_evaluated(table, tmp_path, tiny_clip, capsys):
    """The flags reach the model, its checkpoint, an export of the run, and the loss of the checkpoint."""
    import open_clip

    data = ["--csv-separator", "\t", "--csv-caption-key", "title", "--workers", "0", "--device", "cpu"]
    changes = shlex.split(
        "--force-image-size 48 --force-patch-dropout 0.5 --force-quick-gelu --force-custom-text --image-mean 0.5 "
        "--image-std 0.25 0.5 0.5 --image-interpolation bilinear --image-resize-mode squash --force-context-length 40"
    )
    train = f"--train-data {table} --model {tiny_clip} --batch-size 4 --epochs 1 --logs {tmp_path} --name run"
    assert main([*shlex.split(train), *data, *changes]) == 0
    assert json.loads((tmp_path / "run" / "params.json").read_text())["precision"] == "fp32"
    assert export([str(tmp_path / "run"), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 0
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert model.visual.image_size == (48, 48) and model.visual.patch_dropout.prob == 0.5
    assert model.context_length == 40 and isinstance(model, open_clip.CustomTextCLIP)
    assert [type(block.mlp.gelu).__name__ for block in model.visual.transformer.resblocks] == ["QuickGELU"] * 2
    cfg = model.visual.preprocess_cfg
    assert (cfg["mean"], cfg["std"]) == ([0.5] * 3, [0.25, 0.5, 0.5])
    assert (cfg["interpolation"], cfg["resize_mode"]) == ("bilinear", "squash")

    capsys.readouterr()
    weights = str(tmp_path / "run" / "checkpoints" / "epoch_1.pt")
    config = ["--model-config", str(tmp_path / "out" / "open_clip_config.json"), "--pretrained", weights]
    assert main(["--val-data", str(table), *config, *data, "--batch-size", "8", "--logs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    images = torch.stack([preprocess(Image.open(tmp_path / f"{number}.png")) for number in range(8)])
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")([f"a square of redness {n}" for n in range(8)])
    with torch.no_grad():
        image, text, scale = model.eval()(images, ids)
    expected = open_clip.ClipLoss()(image, text, scale).item()
    assert float(re.search(r"  loss: (\S+)", printed)[1]) == pytest.approx(expected, abs=1e-3)
    line = json.loads(next(tmp_path.glob("2*/checkpoints/results.jsonl")).read_text())
    assert line["val/loss"] == pytest.approx(expected, abs=1e-4) and line["val/num_samples"] == 8


def test_val_data_alone_is_checked_first(table, tmp_path, tiny_clip, capsys):
    flags = ["--val-data", str(tmp_path / "none.csv"), "--model", tiny_clip, "--device", "cpu", "--logs", str(tmp_path)]
    assert main(flags) == 2 and "--val-data" in capsys.readouterr().err
    data = ["--val-data", str(table), "--csv-separator", "\t", "--csv-caption-key", "title"]
    assert main([*data, *flags[2:], "--epochs", "3", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "--epochs: no effect without --train-data" in shown.err and "--val-data has 8 samples" in shown.out


def test_batch_norms_are_synchronised_on_gpus_only(table, tmp_path, capsys):
    flags = f"--train-data {table} --csv-caption-key title --model RN50 --use-bn-sync --device cpu --logs {tmp_path}"
    assert main(flags.split()) == 2
    assert "--use-bn-sync: PyTorch synchronises batch norms on GPUs only" in capsys.readouterr().err
