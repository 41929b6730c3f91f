"""Training from the command line: curves, checkpoints, resuming, and clear errors before any work."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from support import SMALL_LOTLIP, read_results
from training.main import main

SMALL = [*SMALL_LOTLIP, "--workers", "0", "--log-every-n-steps", "1", "--warmup", "2", "--wd", "0.1"]
EXACT = ["--aug-cfg", "scale=1.0,1.0"]  # no random cropping


def train(logs: Path, name: str, data: object, *flags: str) -> list[dict]:
    """Runs a training in this process; returns the lines of its metrics.jsonl."""
    code = main([*SMALL, "--train-data", str(data), "--logs", str(logs), "--name", name, *flags])
    assert code == 0
    return read_metrics(logs, name)


def read_metrics(logs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(logs: Path, name: str, epoch: int) -> dict[str, torch.Tensor]:
    path = logs / name / "checkpoints" / f"epoch_{epoch}.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def trained(scenes, logs) -> list[dict]:
    """Trains two epochs of five steps, with evaluations, validation and checkpoints in between."""
    benchmark = ["--urban1k-retrieval", str(scenes / "urban1k"), "--val-data", str(scenes / "train")]
    return train(logs, "first", scenes / "train", "--batch-size", "8", "--epochs", "2", *benchmark)


def test_every_step_is_logged_with_all_documented_values(trained):
    steps = [line for line in trained if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    names = "loss short_caption_loss long_caption_loss samples_per_s tokens_per_s data_wait_share eta_s lr logit_scale"
    for name in [*names.split(), "grad_norm", "padding_share", "skipped", "epoch", "corner_cls_cosine"]:
        assert all(f"train/{name}" in line for line in steps), name
    for line in steps:
        total = line["train/short_caption_loss"] + line["train/long_caption_loss"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)
        assert 0 <= line["train/padding_share"] < 1 and line["train/skipped"] == 0
        assert -1 <= line["train/corner_cls_cosine"] <= 1
    assert steps[0]["train/lr"] < steps[1]["train/lr"] > steps[-1]["train/lr"]  # warm-up, then cosine


def test_evaluations_during_training_are_those_of_an_evaluation(trained, logs, scenes):
    ends = [line for line in trained if "val/loss" in line]
    assert [line["step"] for line in ends] == [5, 10]
    assert ends[0]["val/num_samples"] == 40 and 0 <= ends[0]["val/long_i2t_top1"] <= 1
    checkpoint = logs / "first" / "checkpoints" / "epoch_2.pt"
    flags = ["--urban1k-retrieval", str(scenes / "urban1k"), "--workers", "0", "--logs", str(logs), "--name", "after"]
    assert main([*SMALL_LOTLIP, "--pretrained", str(checkpoint), *flags]) == 0
    during, after = read_results(logs, "first"), read_results(logs, "after")
    assert during["epoch"] == 2
    for key in after:
        if key.startswith("urban1k-retrieval"):
            assert during[key] == after[key] == ends[1][key], key


def test_the_same_seed_gives_the_same_run_bit_for_bit(trained, logs, scenes):
    again = train(logs, "again", scenes / "train", "--batch-size", "8", "--epochs", "2")
    assert losses(again) == losses(trained) and equal(weights(logs, "first", 2), weights(logs, "again", 2))
    workers = train(logs, "workers", scenes / "train", "--batch-size", "8", "--epochs", "2", "--workers", "1")
    assert losses(workers) == losses(trained)
    other = train(logs, "other", scenes / "train", "--batch-size", "8", "--epochs", "1", "--seed", "1")
    assert losses(other) != losses(trained)[:5]


def test_resuming_after_an_epoch_equals_not_having_stopped(trained, logs, scenes):
    first = logs / "first" / "checkpoints" / "epoch_1.pt"
    flags = ["--batch-size", "8", "--epochs", "2", "--save-most-recent"]
    resumed = train(logs, "resumed", scenes / "train", *flags, "--resume", str(first))
    assert losses(resumed) == losses(trained)[5:]
    assert equal(weights(logs, "resumed", 2), weights(logs, "first", 2))
    assert (logs / "resumed" / "checkpoints" / "epoch_latest.pt").is_file()
    # again: nothing is left to do, and nothing is lost
    assert losses(train(logs, "resumed", scenes / "train", *flags, "--resume", "latest")) == losses(resumed)


def test_checkpoints_are_kept_as_the_flags_say(logs, scenes):
    flags = ["--batch-size", "40", "--epochs", "5"]
    train(logs, "kept", scenes / "train", *flags, "--save-frequency", "2", "--delete-previous-checkpoint")
    assert [p.name for p in (logs / "kept" / "checkpoints").iterdir()] == ["epoch_5.pt"]


def extract(shards: Path, out: Path) -> list[dict]:
    """Writes the images of shards as files; returns the rows of a table of them."""
    rows = []
    (out / "images").mkdir(parents=True)
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files:
            if name.endswith(".jpg"):
                (out / "images" / name).write_bytes(files[name])
                rows.append({"filepath": f"images/{name}", **json.loads(files[name.replace(".jpg", ".json")])})
    return rows


def test_shards_csv_and_parquet_train_alike(logs, scenes, tmp_path):
    """The whole set is one batch, so the order doesn't matter and the curves are the same."""
    rows = extract(scenes / "train", tmp_path)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        as_text = [{k: ". ".join(v) + "." if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(as_text)
    flags = ["--batch-size", "40", "--epochs", "4", "--lr", "1e-4", *EXACT]
    shards = losses(train(logs, "shards", scenes / "train", *flags))
    assert losses(train(logs, "csv", tmp_path / "t.csv", *flags)) == pytest.approx(shards, rel=1e-4)
    assert losses(train(logs, "parquet", tmp_path / "t.parquet", *flags)) == pytest.approx(shards, rel=1e-4)
    assert shards[-1] < shards[0]


def test_a_locked_image_tower_is_unchanged_and_has_no_optimizer_state(logs, scenes):
    flags = ["--batch-size", "20", "--lock-image", "--save-frequency", "1"]
    curve = losses(train(logs, "locked", scenes / "train", *flags, "--epochs", "2"))
    before, after = weights(logs, "locked", 1), weights(logs, "locked", 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)
    content = torch.load(logs / "locked" / "checkpoints" / "epoch_2.pt", weights_only=True)
    num_states = len(content["optimizer"]["state"])
    assert num_states == sum(not name.startswith("visual.") and after[name].is_floating_point() for name in after)
    if shutil.which("g++"):
        compiled = train(logs, "compiled", scenes / "train", *flags, "--epochs", "2", "--torchcompile", "image")
        assert losses(compiled) == pytest.approx(curve, rel=1e-4)
        assert weights(logs, "compiled", 2).keys() == after.keys()


@pytest.mark.parametrize(
    "flags",
    [
        ["--siglip"],
        ["--strong-augment", "--captions", "long", "--num-long-captions", "1"],
        ["--captions", "raw", "--precision", "amp_bf16"],
        ["--grad-checkpointing", "--text-lr", "1e-4", "--grad-clip-norm", "1", "--lr-scheduler", "const"],
        ["--dataset-resampled", "--train-num-samples", "120", "--sub-caption-sentences", "2", "--accum-freq", "2"],
        ["--report-to", "tensorboard", "--short-loss-weight", "0.5", "--long-caption-keys", "longSV_captions"],
        ["--model", "lotlip_clip-ViT-B-16-tiny"],
    ],
)
def test_every_way_of_training_lowers_the_loss(logs, scenes, flags, tiny_clip):
    """Compares with the same batches, crops and dropout at a learning rate that changes nothing.

    This is needed because the losses of different batches differ.
    """
    flags = [tiny_clip if word.endswith("-tiny") else word for word in flags]
    name = flags[0].strip("-") + flags[-1].replace("/", "_")[-9:]
    flags = ["--batch-size", "20", "--epochs", "4", "--lr", "3e-4", *flags]
    curve = losses(train(logs, name, scenes / "train", *flags))
    still = losses(train(logs, f"{name}-still", scenes / "train", *flags, "--lr", "1e-12", "--text-lr", "1e-12"))
    assert curve[0] == pytest.approx(still[0], rel=1e-6)
    assert sum(still[-2:]) - sum(curve[-2:]) > 0.03


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def refused(capsys, *flags: str) -> str:
    """Returns the message of a command that is refused."""
    try:
        code = main([*SMALL, *flags])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and message.count("error:") == 1 and "Traceback" not in message, message
    return message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train-data", "{here}/{{00..03}}.tar"], "3 of 4 shards are missing"),
        (["--train-data", "{here}/nowhere.tar"], "1 of 1 shards are missing"),
        (["--train-data", "{here}/empty"], "no *.tar in this folder"),
        (["--train-data", "{here}/zero.tar"], "not a tar file"),
        (["--train-data", "{here}/none.tar"], "no samples in it"),
        (["--train-data", "{here}/array.tar"], "none of the first 1 samples can be read: JSON not an object"),
        (["--train-data", "{here}/t.csv"], "no image column 'filepath' (--csv-img-key); its columns are a, txt"),
        (
            ["--train-data", "{here}/t.csv", "--csv-img-key", "a", "--raw-caption-keys", "x"],
            "its columns are a, txt (the first line of a CSV is its header); expected captions under one of x, ",
        ),
        (["--train-data", "{here}/no.parquet"], "no such file"),
        (["--train-data", "{here}/bad.parquet"], "not a readable table"),
        (["--train-data", "{set}", "--batch-size", "41"], "a step takes 41 samples, but an epoch has 40"),
        (["--train-data", "{set}", "--train-num-samples", "41"], "there are only 40 samples"),
        (["--train-data", "{set}", "--long-caption-keys", "loong"], "no long caption under loong"),
        (["--train-data", "{set}", "--raw-caption-keys", "x", "--captions", "raw"], "no short caption under x"),
        (["--train-data", "{set}", "--val-data", "{here}/empty"], "--val-data {here}/empty: no *.tar"),
        (["--train-data", "{set}", "--train-data-upsampling-factors", "1"], "without --dataset-resampled"),
        (["--train-data", "{set}", "--dataset-resampled"], "without --train-num-samples"),
        ("--train-data {set} --batch-size 8 --model ViT-S-32-alt --lock-image --lock-text".split(), "nothing to train"),
        (["--train-data", "{set}", "--aug-cfg", "size=3"], "expected one of scale"),
        (["--train-data", "{set}", "--report-to", "mlflow"], "expected any of tensorboard, wandb"),
        (["--train-data", "{set}", "--resume", "{here}/no.pt"], "no such file"),
        (["--train-data", "{set}", "--batch-size", "8", "--resume", "{here}/zero.tar"], "broken file"),
        (["--train-data", "{set}", "--resume", "latest"], "needs --name"),
        (["--train-data", "{set}", "--precision", "pure_fp16"], "use amp or amp_bf16"),
        (["--train-data", "{set}", "--precision", "amp"], "needs a GPU"),
        (["--train-data", "{set}", "--captions", "long", "--num-long-captions", "0"], "at least 1"),
        (["--train-data", "{set}", "--batch-size", "8", "--pretrained", "{here}/zero.tar"], "tried as safetensors"),
        (["--val-data", "{set}", "--urban1k-retrieval", "x"], "x: "),
        (
            ["--train-data", "{here}/tabs.csv"],
            "and its header has tabs, too: name the separator with --csv-separator '\\t'",
        ),
        (
            ["--train-data", "{here}/tabs.csv", "--csv-separator", "\\t"],
            "its columns are filepath, Text, with a comma (the",
        ),
        (["--train-data", "{here}/tabs.csv", "--csv-separator", "::"], "--csv-separator: expected one character"),
    ],
)
def test_bad_input_is_a_message_before_training(flags, said, scenes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "t.csv").write_text("a,txt\nx.jpg,hello\n")
    (tmp_path / "tabs.csv").write_text("filepath\tText, with a comma\nx.jpg\thello, you\n")
    shard(tmp_path / "none.tar", {})
    shard(tmp_path / "00.tar", {"a.jpg": b"", "a.txt": b"a"})
    shard(tmp_path / "array.tar", {"a.jpg": b"", "a.json": b"[]"})
    places = {"here": tmp_path, "set": scenes / "train"}
    message = refused(capsys, "--logs", str(tmp_path / "logs"), *(word.format(**places) for word in flags))
    assert said.format(**places) in message
    assert not (tmp_path / "logs").exists()  # a run that takes no step leaves nothing behind


def test_a_run_is_not_overwritten(trained, logs, scenes, capsys):
    message = refused(capsys, "--train-data", str(scenes / "train"), "--logs", str(logs), "--name", "first")
    assert "contains checkpoints; add --resume latest" in message


def test_a_checkpoint_of_another_model_is_refused(trained, logs, scenes, capsys):
    first = str(logs / "first" / "checkpoints" / "epoch_1.pt")
    flags = ["--train-data", str(scenes / "train"), "--logs", str(logs), "--batch-size", "8", "--resume", first]
    assert "the model or its locked parts differ" in refused(capsys, *flags, "--num-corner-tokens", "1")
    assert "the model or its locked parts differ" in refused(capsys, *flags, "--lock-image")


def test_bad_samples_are_counted_in_the_log(logs, tmp_path, scenes):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes((scenes / "train" / "00000.tar").read_bytes())
    shard(shards / "1.tar", {"a.txt": b"x", "b.jpg": b"x", "b.txt": b"x", "c.jpg": b"x", "c.json": b"{"})
    lines = train(logs, "bad", shards, "--batch-size", "43", "--epochs", "1")
    assert lines[0]["train/skipped_by_kind"] == {"no image": 1, "broken image": 1, "broken JSON": 1}
    text = (logs / "bad" / "out.log").read_text()
    assert "skipped sample, broken JSON: 1.tar/c" in text and "46 samples read, 3 skipped (" in text
