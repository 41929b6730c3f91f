"""Comparison with open_clip's trainer, which runs here: equal losses and weights, and checkpoints load both ways.

A batch is the whole data set, so the order in which a trainer shuffles it doesn't change a step.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import training
from support import end_ranks, speak_to_files, start_ranks
from training.main import main
from training.train.optim import load_optimizer_state, make_optimizer, parameter_groups

NUM_IMAGES = 12
EPOCHS = 20


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Writes images of the model's size, so that every crop is the whole image, and captions of different lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    pixels = torch.randint(0, 256, (NUM_IMAGES, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for number in range(NUM_IMAGES):
            Image.fromarray(pixels[number].numpy()).save(folder / f"{number}.png")
            writer.writerow([folder / f"{number}.png", f"image {number} of noise" + " and more noise" * number])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def model(tiny_clip, tmp_path_factory) -> str:
    """Saves the small model as a folder for both trainers; open_clip's needs its own name for the weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_clip.removeprefix("local-dir:"), folder)
    (folder / "open_clip_model.pt").rename(folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def words(table: Path, model: str, logs: Path, name: str, *more: object) -> list[str]:
    """Returns a launch line that both trainers accept."""
    line = (
        f"--dataset-type csv --train-data {table} --csv-img-key filepath --csv-caption-key title --workers 0 "
        f"--model {model} --batch-size {NUM_IMAGES} --epochs {EPOCHS} --lr 2e-4 --warmup 4 --wd 0.5 --beta1 0.9 "
        "--beta2 0.98 --eps 1e-6 --precision fp32 --aug-cfg scale=(1.0,1.0) --grad-clip-norm 1.0 "
        f"--log-every-n-steps 1 --save-frequency 10 --device cpu --logs {logs} --name {name} --report-to tensorboard"
    )
    return [*line.split(), "--csv-separator", "\t", *map(str, more)]


def _their_main(_: int, argv: list[str], folder: str) -> None:
    import open_clip_train.main

    speak_to_files(0, folder)
    open_clip_train.main.main(argv)


def train_theirs(argv: list[str], folder: Path) -> None:
    """Runs open_clip's trainer in a separate process, because it changes the logging of its process."""
    folder.mkdir(exist_ok=True)
    codes = end_ranks(start_ranks(_their_main, 1, argv, str(folder)))
    assert codes == [0], (folder / "0.err").read_text()[-2000:]


def their_losses(run: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def our_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def weights(run: Path, epoch: int = EPOCHS) -> dict:
    return torch.load(run / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def theirs(table, model, tmp_path_factory) -> Path:
    """Trains with open_clip's trainer."""
    logs = tmp_path_factory.mktemp("theirs")
    train_theirs(words(table, model, logs, "run"), logs / "said")
    return logs / "run"


@pytest.fixture(scope="module")
def ours(table, model, tmp_path_factory) -> Path:
    """Trains with our trainer and the same launch line."""
    logs = tmp_path_factory.mktemp("ours")
    assert main(words(table, model, logs, "run")) == 0
    return logs / "run"


def test_both_train_from_the_same_shards(scenes, model, tmp_path):
    """The installed webdataset is one with which open_clip's trainer works."""
    shards = sorted(map(str, (scenes / "train").glob("*.tar")))
    line = (
        f"--train-data {'::'.join(shards)} --dataset-type webdataset --train-num-samples 24 --batch-size 8 --epochs 1"
    )
    line += f" --workers 1 --warmup 1 --precision fp32 --model {model} --device cpu --report-to tensorboard"
    train_theirs([*line.split(), "--logs", str(tmp_path / "theirs"), "--name", "run"], tmp_path / "said")
    assert main([*line.split(), "--captions", "raw", "--logs", str(tmp_path / "ours"), "--name", "run"]) == 0
    theirs, ours = weights(tmp_path / "theirs" / "run", 1), weights(tmp_path / "ours" / "run", 1)
    assert theirs.keys() == ours.keys() and their_losses(tmp_path / "theirs" / "run")


def test_losses_and_weights_are_those_of_open_clip(theirs, ours):
    expected, got = their_losses(theirs), our_losses(ours)
    assert len(expected) == len(got) == EPOCHS and expected[0] - expected[-1] > 0.5
    assert got == pytest.approx(expected, abs=1e-4)
    expected, got = weights(theirs), weights(ours)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=name)


def test_losses_of_accumulated_batches_are_those_of_open_clip(table, model, tmp_path):
    # Without clipping: open_clip adds up the logit scale's gradient once per micro-batch, which changes the norm of the
    # gradient, but not Adam's updates.
    more = ["--batch-size", NUM_IMAGES // 2, "--accum-freq", 2, "--epochs", 6, "--grad-clip-norm", 1e9]
    train_theirs(words(table, model, tmp_path, "theirs", *more), tmp_path / "said")
    assert main(words(table, model, tmp_path, "ours", *more)) == 0
    assert our_losses(tmp_path / "ours") == pytest.approx(their_losses(tmp_path / "theirs"), abs=1e-4)


def test_their_checkpoint_continues_here(theirs, table, model, tmp_path):
    start = theirs / "checkpoints" / "epoch_10.pt"
    assert main(words(table, model, tmp_path, "run", "--resume", start)) == 0
    assert our_losses(tmp_path / "run") == pytest.approx(their_losses(theirs)[10:], abs=1e-4)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=0, atol=1e-4, msg=name)


def test_our_checkpoint_continues_there(ours, table, model, tmp_path):
    start = ours / "checkpoints" / "epoch_10.pt"
    train_theirs(words(table, model, tmp_path, "run", "--resume", start), tmp_path / "said")
    assert their_losses(tmp_path / "run") == pytest.approx(our_losses(ours)[10:], abs=1e-4)


def their_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer with parameters in the order of open_clip's trainer, after one step."""
    small = {n for n, p in model.named_parameters() if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias"))}
    kept = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in kept if (n in small) == first]} for first in (True, False)]
    )
    for number, (_, parameter) in enumerate(kept):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    return optimizer


def test_their_optimizer_is_taken_over_parameter_by_parameter():
    """Also for groups with a learning rate per tower, and for a model with a locked tower."""
    model = training.create_model("lotlip_tiny", pretrained_text=False)
    model.lock_image_tower(unlocked_groups=1)
    theirs = their_optimizer(model)
    ours = make_optimizer(parameter_groups(model, 1e-3, 0.1, 1e-4, None), "adamw", 1e-3, (0.9, 0.95), 1e-8)
    load_optimizer_state(ours, theirs.state_dict(), model.state_dict(), dict(model.named_parameters()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(ours.param_groups) > 2 and len(trained) > 10 and len(ours.state) == len(trained)
    for parameter in trained:
        assert torch.equal(ours.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg"])
    assert {group["lr"] for group in ours.param_groups} == {1e-3, 1e-4}
    assert {group["betas"] for group in ours.param_groups} == {(0.9, 0.95)}


def test_a_checkpoint_of_other_locked_parts_is_refused(theirs, table, model, tmp_path, capsys):
    start = theirs / "checkpoints" / "epoch_10.pt"
    assert main(words(table, model, tmp_path, "run", "--resume", start, "--lock-image")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(start) in error and "--lock-* differ" in error
    again = words(
        table, model, tmp_path, "other", "--resume", start, "--batch-size", 4, "--epochs", 11, "--aug-cfg", "none"
    )
    assert main(again) == 0
    assert "done:" in (tmp_path / "other" / "out.log").read_text()
