"""The comparisons: commands of several tools that do the same work."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environment import make_environment
from benchmarks.peers.inputs import MODEL, write_evaluation, write_training, write_weights
from benchmarks.peers.processes import Side

HERE = Path(__file__).parent
BATCH_SIZE = 64


@dataclass(frozen=True)
class Trial:
    """One comparison.

    Attributes:
        name: key in the JSON file.
        title: the work, and its size.
        sides: ``ours`` and each peer.
        metric: ``seconds`` of the whole process, or the name of a number that every side prints; higher is better.
    """

    name: str
    title: str
    sides: dict[str, Side]
    metric: str = "seconds"


def training(folder: Path, num_images: int) -> Trial:
    """Training of a stock model on short captions: our trainer and open_clip's."""
    shards = write_training(folder / "train", num_images)
    theirs = make_environment(folder / "environments", "open_clip_train")
    same = ["--train-data", shards, "--train-num-samples", num_images, "--model", MODEL, "--batch-size", BATCH_SIZE]
    same += ["--epochs", 1, "--workers", 1, "--precision", "fp32", "--warmup", 5, "--lr", "1e-4", "--wd", 0.2]
    same += ["--beta1", 0.9, "--beta2", 0.98, "--eps", "1e-6", "--logs", folder / "logs", "--seed", 0]

    def side(python: object, module: str, name: str, *more: object) -> Side:
        command = [python, "-m", module, *same, "--name", name, *more]
        return Side(_words(command), cleanup=lambda: shutil.rmtree(folder / "logs" / name, ignore_errors=True))

    sides = {
        "ours": side(sys.executable, "training.main", "ours", "--captions", "raw", "--num-long-captions", 0),
        "open_clip_train": side(theirs, "open_clip_train.main", "theirs", "--dataset-type", "webdataset"),
    }
    return Trial("training", f"train {MODEL}: {num_images:,} images, one short caption each, whole process", sides)


def evaluation(folder: Path, num_images: int) -> Trial:
    """Retrieval with one model: our evaluator, CLIP_benchmark, and a loop of one image and one caption at a time."""
    shard = write_evaluation(folder / "eval", num_images)
    weights = write_weights(folder / "weights.pt")
    theirs = make_environment(folder / "environments", "clip_benchmark")
    logs, output = folder / "logs", folder / "clip_benchmark.json"
    ours = [sys.executable, "-m", "training.main", "--retrieval-wds", shard, "--retrieval-caption-keys", "txt"]
    ours += ["--model", MODEL, "--pretrained", weights, "--batch-size", BATCH_SIZE, "--workers", 1, "--logs", logs]
    peer = [theirs, "-m", "clip_benchmark.cli", "eval", "--task", "zeroshot_retrieval", "--dataset", "wds/pairs"]
    peer += ["--dataset_root", folder / "eval", "--model", MODEL, "--pretrained", weights, "--no_amp"]
    peer += ["--batch_size", BATCH_SIZE, "--num_workers", 1, "--recall_k", 1, "--output", output, "--quiet"]

    def theirs_read(_: str) -> dict[str, float]:
        metrics = json.loads(output.read_text())["metrics"]
        return {"i2t": metrics["text_retrieval_recall@1"], "t2i": metrics["image_retrieval_recall@1"]}

    def ours_read(_: str) -> dict[str, float]:
        record = json.loads((logs / "eval" / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
        return {way: next(v for k, v in record.items() if k.endswith(f"{way}-top1")) for way in ("i2t", "t2i")}

    def loop_read(text: str) -> dict[str, float]:
        return dict(zip(("i2t", "t2i"), map(float, text.split()[-2:])))

    fast = [*ours, "--image-decoding", "fast"]
    sides = {
        "ours": Side(_words([*ours, "--name", "eval"]), ours_read),
        "ours, fast decoding": Side(_words([*fast, "--name", "eval"]), ours_read),
        "CLIP_benchmark": Side(_words(peer), theirs_read),
        "one at a time": Side(_words([sys.executable, HERE / "one_at_a_time.py", shard, MODEL, weights]), loop_read),
    }
    return Trial("evaluation", f"retrieval with {MODEL}: {num_images:,} images of 1,200 x 800 pixels", sides)


def loading(folder: Path, num_images: int) -> Trial:
    """Loading of images and tokens without a model: our loader and open_clip's pipeline, one loader process each."""
    shards = write_training(folder / "train", num_images)
    theirs = make_environment(folder / "environments", "open_clip_train")
    words = [shards, MODEL, BATCH_SIZE, num_images, 1]
    read = _last_number("samples_per_s")
    sides = {
        "ours": Side(_words([sys.executable, HERE / "load_ours.py", *words]), read),
        "open_clip pipeline": Side(_words([theirs, HERE / "load_theirs.py", *words]), read),
    }
    return Trial("loading", f"load {num_images:,} images and captions, one process", sides, "samples_per_s")


TRIALS: dict[str, Callable[[Path, int], Trial]] = {"training": training, "evaluation": evaluation, "loading": loading}
SIZES = {"training": 1280, "evaluation": 256, "loading": 1280}


def _words(command: list) -> list[str]:
    return [str(word) for word in command]


def _last_number(name: str) -> Callable[[str], dict[str, float]]:
    return lambda text: {name: float(re.findall(r"[\d.]+(?:e[+-]?\d+)?", text)[-1])}
