"""--experiment: the examples equal their formulas, train on one and two processes, and resume bit-equal."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from support import SMALL_LOTLIP, run_ranks
from training.flags.parser import parse_args
from training.main import main
from training.runtime.experiment import experiment_of, load_experiment

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN = [*SMALL_LOTLIP, *"--device cpu --workers 1 --lr-scheduler const --warmup 2 --log-every-n-steps 1".split()]

OWN = """
import torch
from training import Experiment

class Weighted(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss, self.gain = loss, torch.nn.Parameter(torch.ones(()))

    def forward(self, number, **inputs):
        assert number.shape == inputs["image_features"].shape[:1]
        terms = self.loss(**inputs)
        return terms | {"own_loss": (self.gain * number.mean() - 3.0) ** 2}

class Mine(Experiment):
    @classmethod
    def add_flags(cls, group):
        group.number("--own-number", 2.0, "a number")

    def sample_fields(self, record, texts):
        return {"number": torch.tensor(self.args.own_number)}

    def make_loss(self, loss, core):
        return Weighted(loss)
"""


def example(name: str) -> ModuleType:
    return sys.modules[load_experiment(str(EXAMPLES / name)).__module__]


def unit(*shape: int, seed: int) -> torch.Tensor:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(features, dim=-1).requires_grad_()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_hn_clip_is_the_published_formula(sigmoid):
    module = example("hn_clip.py")
    images, texts, scale, bias = unit(6, 8, seed=0), unit(6, 3, 8, seed=1), torch.tensor(9.0), torch.tensor(-2.0)
    (found,) = module.ScaledLogits(0.5, sigmoid)(images, texts, scale, bias).values()
    wanted = 0.0
    for column in range(3):
        text = texts[:, column]
        extra = (text @ text.T).detach()
        logits = scale * (images @ text.T + 0.5 * (extra - extra.diag().diag()))
        if sigmoid:
            signs = 2 * torch.eye(6) - 1
            wanted = wanted - functional.logsigmoid(signs * (logits + bias)).sum() / 6 / 3
        else:
            rows, columns = logits.log_softmax(1).diag(), logits.log_softmax(0).diag()
            wanted = wanted - (rows.mean() + columns.mean()) / 2 / 3
    torch.testing.assert_close(found, wanted)
    for got, expected in zip(*(torch.autograd.grad(loss, (images, texts)) for loss in (found, wanted))):
        torch.testing.assert_close(got, expected)


def test_the_corners_penalty_is_a_plain_loop():
    module = example("corner_diversity.py")

    class NoTerms(torch.nn.Module):
        gather_early = None

        def forward(self, text_features):
            return {}

    texts = unit(4, 1 + 2 * 3, 8, seed=2).detach()  # two long captions with [CLS] and two corners each
    found = module.WithPenalty(NoTerms(), 2, 0.1)(text_features=texts)["corner_penalty"]
    pairs = [(a, b) for start in (1, 4) for a, b in ((start, start + 1), (start, start + 2), (start + 1, start + 2))]
    wanted = [float(row[a] @ row[b]) ** 2 for row in texts for a, b in pairs]
    assert float(found) == pytest.approx(0.1 * sum(wanted) / len(wanted))


def test_fields_reach_a_process_that_has_not_loaded_the_file(own):
    args = parse_args(["--experiment", str(own), "--own-number", "1.5", "--train-data", "x.tar"])
    content = pickle.dumps(experiment_of(args).sample_fields)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())({}, []))"
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert done.stdout == b"{'number': tensor(1.5000)}\n", done.stderr


def losses(logs: Path, name: str) -> list[float]:
    lines = (logs / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("flags", [["hn_clip.py", "--siglip"], ["corner_diversity.py", "--lock-image"], ["own"]])
def test_it_trains_on_one_and_two_processes_and_resumes_bit_for_bit(flags, own, scenes, tmp_path):
    name, *flags = flags
    path = str(own if name == "own" else EXAMPLES / name)
    argv = [*TRAIN, "--experiment", path, *flags, "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    for run, epochs in (("whole", "2"), ("run", "1"), ("run", "2")):  # ten steps an epoch
        again = ["--name", run, "--epochs", epochs, "--resume", "latest", "--batch-size", "4"]
        assert main([*argv, *again]) == 0
    ends = [torch.load(tmp_path / run / "checkpoints/epoch_2.pt", weights_only=True) for run in ("whole", "run")]
    for part in ("state_dict", "loss"):
        whole, resumed = (end.get(part, {}) for end in ends)
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), part
    assert losses(tmp_path, "whole") == losses(tmp_path, "run")
    if name == "own":
        assert float(ends[0]["loss"]["gain"]) > 1.005  # it moves towards 3 / 2
    assert (tmp_path / "run" / "experiment.py").read_text() == Path(path).read_text()

    # Each step takes all 40 scenes, so that both compare the same captions.
    argv += ["--epochs", "3", "--text-packing", "padded", "--eps", "0.01", "--name"]
    done = run_ranks([*argv, "two", "--batch-size", "20"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*argv, "one", "--batch-size", "40"]) == 0
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)


def test_accumulation_and_mixed_precision_work_and_a_dry_run_says_what_it_leaves_out(own, scenes, tmp_path, capsys):
    argv = [*TRAIN, "--experiment", str(own), "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    argv += ["--own-number", "1.5", "--batch-size", "10", "--accum-freq", "2", "--epochs", "1", "--name", "run"]
    assert main([*argv, "--precision", "amp_bf16"]) == 0
    assert len(losses(tmp_path, "run")) == 2 and "own" in capsys.readouterr().err
    assert main([*argv, "--dry-run"]) == 0
    assert f"not traced: the loss, fields and stepper of --experiment {own}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--experiment", str(own), "--help-all"])
    assert "--own-number X" in capsys.readouterr().out


def test_a_config_file_names_the_experiment_and_its_flags(tmp_path, capsys):
    argv = ["--experiment", str(EXAMPLES / "hn_clip.py"), "--hn-gamma", "0.3", "--train-data", "synthetic"]
    with pytest.raises(SystemExit):
        parse_args([*argv, "--print-config"])
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert vars(parse_args(["--config", str(path)])) == vars(parse_args(argv)) | {"config": [str(path)]}
    assert parse_args(["--config", str(path), "--hn-gamma", "0.4"]).hn_gamma == 0.4


def test_other_code_is_refused_on_resuming_and_bad_names_at_once(own, scenes, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    argv = [*TRAIN, "--train-data", str(scenes / "train"), "--logs", str(tmp_path), "--name", "run"]
    argv += ["--batch-size", "20", "--resume", "latest", "--experiment"]
    assert main([*argv, str(path), "--epochs", "1"]) == 0
    assert main([*argv, str(EXAMPLES / "hn_clip.py"), "--epochs", "2"]) == 2
    assert "with which the run was begun" in capsys.readouterr().err
    for name, said in (("none.py", "no such file"), ("json", "expected one subclass"), ("no.such", "No module")):
        with pytest.raises(SystemExit) as stop:
            main([*argv, name])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*TRAIN, "--train-data", "x", "--own-number", "1"])
    assert "unrecognized arguments: --own-number" in capsys.readouterr().err
