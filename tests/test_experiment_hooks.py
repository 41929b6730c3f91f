"""--experiment: views of captions, the order of samples, a moving average and benchmarks."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_experiments import EXAMPLES, TRAIN, boxes, losses  # noqa: F401
from test_safety import steps  # noqa: F401
from test_train_data import make_shards, reader
from torch.nn.functional import logsigmoid, normalize

from dataloaders.registry import benchmarks
from support import SMALL_LOTLIP, evaluate, read_results, run_ranks
from training.data.loader import make_loader
from training.data.order import Share
from training.data.shards import ShardSource
from training.main import main
from training.model.towers.train_model import PatchModel
from training.runtime.experiment import Experiment

HOOKS = """
import torch
from timm.utils import ModelEmaV3
from dataloaders.registry import Benchmark
from dataloaders.urban1k import read_urban1k
from training import Experiment

class Grown(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss, self.grow = loss, torch.nn.Linear(32, 32)

    def forward(self, text_features, age, **inputs):
        assert text_features.shape[1] == 1 + 3 * 3 + 2
        terms = self.loss(text_features=text_features[:, :-2], **inputs)
        grown = self.grow(inputs["image_features"]) - text_features[:, -1] * age[:, None]
        return terms | {"grown_loss": grown.square().mean()}

class Hooks(Experiment):
    group_batches = 3
    benchmarks = (Benchmark("moon", "--moon-retrieval", "folder", read_urban1k),)

    def views(self, texts, record, at):
        return [*texts, f"a {at.random.choice(['red', 'blue'])} moon", f"{at.step} and {at.source}"]

    def sample_fields(self, record, texts):
        return {"age": torch.tensor(float(texts[-1].split()[0]))}

    def order_samples(self, samples, batch_size):
        return sorted(range(len(samples)), key=lambda number: samples[number].record["raw_caption"])

    def make_average(self, core):
        return ModelEmaV3(core, decay=0.5)

    def make_loss(self, loss, core):
        return Grown(loss)
"""


@pytest.fixture(scope="module")
def hooks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hooks") / "hooks.py"
    path.write_text(HOOKS)
    return path


class Recorder(Experiment):
    """Shows the step for which a sample is read, and puts similar samples into one batch."""

    group_batches = 3

    def sample_fields(self, record: dict, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(int(texts[0]))}

    def views(self, texts: list[str], record: dict, at: object) -> list[str]:
        return [str(at.step), *texts[1:], f"{at.epoch} {at.source} {at.random.random()}"]

    def order_samples(self, samples: list, batch_size: int) -> list[int]:
        assert all(sample.record["caption"].startswith("s") for sample in samples)
        return sorted(range(len(samples)), key=lambda n: int(samples[n].record["caption"][1:]) % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_groups_of_batches_are_ordered_and_continue_at_any_batch(workers, tmp_path):
    source, share = ShardSource(make_shards(tmp_path, [30, 30]), [30, 30], seed=0), Share(4, 14, slots_done=(0, 0))
    plain = replace(reader(epoch=2), step=20, accum_freq=2)
    ordered = replace(plain, experiment=Recorder(None))
    before = list(make_loader(source, plain, share, workers, pin=False))
    found = list(make_loader(source, ordered, share, workers, pin=False))
    number = max(workers, 1)
    for worker in range(number):
        keys = [batch.keys for batch in before[worker::number]]
        for start in range(0, len(keys), 3):
            group = sorted(sum(keys[start : start + 3], []), key=lambda key: int(key[-6:]) % 3)
            got = [batch.keys for batch in found[worker + start * number :: number][:3]]
            assert got == [group[n : n + 4] for n in range(0, len(group), 4)]
            first = worker + start * number
            for batch in found[first::number][:3]:
                assert batch.inputs["field.step"].tolist() == [20 + first // 2] * 4
    for done in (2, 4, 6, 10):
        slots = dict(batch.position for batch in found[:done])
        rest = replace(share, batches_done=done, slots_done=tuple(slots.get(w, 0) for w in range(number)))
        again = list(make_loader(source, replace(ordered, step=20 + done // 2), rest, workers, pin=False))
        assert [b.keys for b in again] == [b.keys for b in found[done:]]
        assert all(torch.equal(a.inputs[k], b.inputs[k]) for a, b in zip(again, found[done:]) for k in a.inputs)


def test_all_hooks_train_and_resume_within_an_epoch_bit_for_bit(hooks, scenes, tmp_path, steps, capsys):  # noqa: F811
    argv = [*TRAIN, "--experiment", str(hooks), "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    argv += ["--batch-size", "2", "--accum-freq", "2", "--epochs", "2", "--lr", "0.01", "--name"]  # ten steps an epoch
    moon = ["--moon-retrieval", str(scenes / "urban1k")]
    steps["stop"] = 14
    assert main([*argv, "run", *moon]) == 75
    steps.clear()
    assert main([*argv, "run", *moon, "--resume", "latest", "--batch-size", "4"]) == 2
    assert "orders groups of batches, of which some are begun" in capsys.readouterr().err
    assert main([*argv, "run", *moon, "--resume", "latest"]) == 0
    assert main([*argv, "whole", *moon]) == 0
    assert losses(tmp_path, "whole") == losses(tmp_path, "run")
    whole, run = (torch.load(tmp_path / n / "checkpoints/epoch_2.pt", weights_only=True) for n in ("whole", "run"))
    for part in ("state_dict", "loss", "ema"):
        assert all(torch.equal(value, run[part][name]) for name, value in whole[part].items()), part
    assert any(not torch.equal(value, whole["ema"][name]) for name, value in whole["state_dict"].items())

    # Training evaluates the averaged weights, which are those that an evaluation reads from the checkpoint.
    weights = str(tmp_path / "run/checkpoints/epoch_2.pt")
    apart = evaluate(tmp_path, SMALL_LOTLIP[1], "--experiment", hooks, *moon, "--pretrained", weights, name="apart")
    found = [{k: v for k, v in r.items() if k.startswith("urban1k")} for r in (read_results(tmp_path, "run"), apart)]
    assert found[0] and found[0] == found[1]

    with pytest.raises(SystemExit):  # without the file there is no such flag
        main([*SMALL_LOTLIP, *moon])
    assert "unrecognized arguments: --moon-retrieval" in capsys.readouterr().err
    assert "moon" not in {benchmark.name for benchmark in benchmarks()}


def test_two_processes_average_as_one(hooks, scenes, tmp_path):
    argv = [*TRAIN, "--experiment", str(hooks), "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    argv += ["--epochs", "2", "--text-packing", "padded", "--eps", "0.01", "--name"]
    done = run_ranks([*argv, "two", "--batch-size", "20"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*argv, "one", "--batch-size", "40"]) == 0
    two, one = (torch.load(tmp_path / n / "checkpoints/epoch_2.pt", weights_only=True)["ema"] for n in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_a_teachers_cached_features_train_under_accumulation(boxes, tmp_path):  # noqa: F811
    argv = [*TRAIN, "--experiment", str(EXAMPLES / "distillation.py"), "--teacher-key", "teacher", "--train-data"]
    argv += [str(boxes), "--logs", str(tmp_path), "--epochs", "2", "--eps", "0.01", "--text-packing", "padded"]
    assert main([*argv, "--name", "one", "--batch-size", "40"]) == 0
    assert main([*argv, "--name", "four", "--batch-size", "10", "--accum-freq", "4"]) == 0
    assert losses(tmp_path, "four") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("distillation.py", "", "--teacher, --teacher-key: give one of both"),
        ("distillation.py", "--teacher lotlip_tiny", "--teacher lotlip_tiny: 128 dimensions, --model has 32"),
        ("distillation.py", "--teacher lotlip_tiny --dry-run", "makes what can't be traced, such as a teacher"),
        ("flair.py", "", "no text-conditioned pooling; use flair-ViT-B-16"),
        ("regions.py", "--strong-augment", "boxes do not follow augmentation"),
    ],
)
def test_an_example_refuses_what_it_can_not_do(name, flags, said, scenes, tmp_path, capsys):
    argv = [*TRAIN, "--experiment", str(EXAMPLES / name), "--train-data", str(scenes / "train"), "--batch-size", "4"]
    assert main([*argv, *flags.split(), "--logs", str(tmp_path), "--name", "run"]) == 2
    assert said in capsys.readouterr().err


def test_the_page_of_experiments_has_code_that_runs():
    page = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {"PatchModel": PatchModel}
    for block in blocks:
        exec(block, names)
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in ((4, 8), (4, 3, 8)))
    found = names["FlairLoss"](0, 1)(images, texts, torch.tensor(7.0), torch.tensor(-3.0))["global_loss"]
    signs = (2 * torch.eye(4) - 1).repeat_interleave(3, dim=1)
    wanted = -logsigmoid(signs * (7.0 * images @ texts.flatten(0, 1).T - 3.0)).sum() / (4 * 3)
    torch.testing.assert_close(found, wanted)
    rows = [SimpleNamespace(record={"kind": kind}) for kind in (2, 1, 2, 0)]
    assert names["Sorted"](None).order_samples(rows, 2) == [3, 1, 0, 2]
