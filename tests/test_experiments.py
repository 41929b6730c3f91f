"""--experiment: the examples equal their formulas, train on one and two processes, and resume bit-equal."""

import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from dataloaders.scene_drawing import make_scene
from support import SMALL_LOTLIP, run_ranks
from training.flags.parser import parse_args
from training.main import main
from training.model.towers.flair import TextConditionedPooling
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
        group.add_argument("--own-number", type=float, default=2.0, help="a number")

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
    compare(found, wanted, images, texts)


def test_the_corners_penalty_is_a_plain_loop():
    module = example("corner_diversity.py")

    texts = unit(4, 1 + 2 * 3, 8, seed=2).detach()  # two long captions with [CLS] and two corners each
    found = module.WithPenalty(NoTerms(), 2, 0.1)(text_features=texts)["corner_penalty"]
    pairs = [(a, b) for start in (1, 4) for a, b in ((start, start + 1), (start, start + 2), (start + 1, start + 2))]
    wanted = [float(row[a] @ row[b]) ** 2 for row in texts for a, b in pairs]
    assert float(found) == pytest.approx(0.1 * sum(wanted) / len(wanted))


def compare(found: torch.Tensor, wanted: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Compares two losses, and their gradients for the inputs."""
    torch.testing.assert_close(found, wanted)
    for got, expected in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (found, wanted))):
        torch.testing.assert_close(got, expected)


class NoTerms(torch.nn.Module):
    """A loss without terms, to be wrapped."""

    def forward(self, **inputs):
        return {}


def test_flair_is_the_published_loss(monkeypatch):
    n, k, dim, scale, bias = 4, 3, 8, torch.tensor(7.0), torch.tensor(-3.0)
    images, patches = unit(n, dim, seed=0), unit(n, 5, dim, seed=1)
    queries = (unit(n, k, dim, seed=2) * 3).detach().requires_grad_()
    pooling = TextConditionedPooling(dim, 2).double()
    drawn = torch.randint(k, (n, n), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "randint", lambda *args, **options: drawn)
    found = example("flair.py").FlairLoss(pooling)(images, patches, queries, scale, bias)

    def term(y: int, image: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return -functional.logsigmoid(y * (scale * image @ functional.normalize(query, dim=0) + bias))

    def pool(i: int, query: torch.Tensor) -> torch.Tensor:
        return functional.normalize(pooling(query[None, None], patches[i : i + 1])[0, 0], dim=0)

    tcs = mps = 0.0
    for i in range(n):
        row = [(1, queries[i, t]) for t in range(k)]
        row += [(-1, queries[j, drawn[i, j]]) for j in range(n) if j != i]
        assert len(row) == n + k - 1
        tcs = tcs + sum(term(y, pool(i, u), u) for y, u in row) / len(row)
        mps = mps + sum(term(1 if i == j else -1, images[i], u) for j in range(n) for u in queries[j]) / (n * k)
    compare(sum(found.values()), (tcs + mps) / 2, images, patches, queries, pooling.attn.in_proj_weight)


def test_dreamlip_groups_patches_as_published():
    patches, texts, scale = (unit(3, 6, 8, seed=0) * 2).detach().requires_grad_(), unit(3, 4, 8, seed=1), 9.0
    wanted = 0.0
    for points, sentences in zip(functional.normalize(patches, dim=-1), texts):
        grouped = []
        for text in sentences:
            w = points @ text
            w = (w - w.min()) / (w.max() - w.min())
            w = torch.where(w < 1 / 6, torch.zeros_like(w), w)
            grouped.append(functional.normalize((w / w.sum()) @ points, dim=0))
        logits = scale * torch.stack(grouped) @ sentences.T
        wanted = wanted - (logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2 / 3
    compare(example("dreamlip.py").grouping_loss(patches, texts, torch.tensor(scale)), wanted, patches, texts)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_hard_texts_are_negclips_columns(sigmoid):
    images, texts, hard = unit(5, 8, seed=0), unit(5, 2, 8, seed=1), unit(5, 2, 8, seed=2)
    scale, bias = torch.tensor(9.0), torch.tensor(-2.0)
    is_hard = torch.tensor([[True, True]] * 3 + [[True, False]] * 2)
    loss = example("hard_texts.py").HardTextLoss(sigmoid)
    (found,) = loss(images, torch.cat([texts, hard], dim=1), scale, is_hard, bias).values()
    further, wanted = hard[is_hard], 0.0
    for text in texts.unbind(1):
        logits = scale * images @ torch.cat([text, further]).T
        if sigmoid:
            signs = torch.cat([2 * torch.eye(5) - 1, -torch.ones(5, len(further))], dim=1)
            wanted = wanted - functional.logsigmoid(signs * (logits + bias)).sum() / 5 / 2
        else:
            rows, columns = logits.log_softmax(1), (scale * images @ text.T).log_softmax(0)
            wanted = wanted - (rows[:, :5].diag().mean() + columns.diag().mean()) / 2 / 2
    compare(found, wanted, images, texts, hard)


@pytest.mark.parametrize(
    ("exchange", "caption", "expected"),
    [
        ("attributes", "A red ring and a blue star", {"A blue ring and a red star"}),
        ("attributes", "A large ring beside a small one of red", {"A small ring beside a large one of red"}),
        ("attributes", "A ring of red, red as a rose", {"A ring of red, red as a rose"}),
        ("halves", "A ring is red. A star is blue.", {"A ring is blue. A star is red."}),
        ("halves", "A ring is red.", {"A ring is red."}),
    ],
)
def test_hard_texts_exchange(exchange, caption, expected):
    made = getattr(example("hard_texts.py"), f"exchange_{exchange}")
    assert {made(caption, random.Random(seed)) for seed in range(5)} == expected


def test_distillation_is_one_minus_the_cosine():
    student, teacher = unit(5, 3, 8, seed=0), torch.randn(5, 8, dtype=torch.float64)
    loss = example("distillation.py").WithTeacher(NoTerms(), None, 0.0)
    (found,) = loss(teacher_features=teacher, text_features=student).values()
    wanted = 1 - sum(s[0] @ t / t.norm() for s, t in zip(student, teacher.float().double())) / 5
    compare(found, wanted, student)


def test_regions_are_compared_as_published():
    loss = example("regions.py").WithRegions(NoTerms(), 0.5).double()
    patches, texts = unit(2, 16, 8, seed=0), unit(2, 1 + 3, 8, seed=1)
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0.5, 1, 1], [0, 0, 1, 1]], dtype=torch.float64).expand(2, -1, -1)
    is_box = torch.tensor([[True, True, False], [True, False, False]])
    (found,) = loss(texts, patches, boxes, is_box).values()
    grid = patches.unflatten(1, (4, 4))
    means = [grid[0, :2, :2], grid[0, 2:, 1:], grid[1, :2, :2]]  # the boxes end where patches do
    regions = torch.stack([functional.normalize(part.mean((0, 1)), dim=0) for part in means])
    phrases = torch.stack([texts[0, 1], texts[0, 2], texts[1, 1]])
    logits = loss.logit_scale.exp() * regions @ phrases.T
    wanted = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).sum() / (2 * 3)
    compare(found, 0.5 * wanted, patches, texts, loss.logit_scale)


def test_fields_reach_a_process_that_has_not_loaded_the_file(own):
    args = parse_args(["--experiment", str(own), "--own-number", "1.5", "--train-data", "x.tar"])
    content = pickle.dumps(experiment_of(args).sample_fields)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())({}, []))"
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert done.stdout == b"{'number': tensor(1.5000)}\n", done.stderr


def losses(logs: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def boxes(scenes, tmp_path_factory) -> Path:
    """A shard with boxes of the shapes of each scene, and a teacher's features, in its JSON."""
    path = tmp_path_factory.mktemp("boxes") / "00000.tar"
    with tarfile.open(scenes / "train" / "00000.tar") as old, tarfile.open(path, "w") as new:
        for number, member in enumerate(old.getmembers()):
            content = old.extractfile(member).read()
            if member.name.endswith(".json"):
                row, scene = json.loads(content), make_scene(1, "train", number // 3)
                found = scene.objects[: 3 + number % 2]
                row["regions"] = [
                    {
                        "box": [o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius],
                        "text": f"{o.colour} {o.shape}",
                    }
                    for o in found
                ]
                row["teacher"] = torch.randn(32, generator=torch.Generator().manual_seed(number)).tolist()
                content = json.dumps(row).encode()
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def pooling(tmp_path_factory) -> str:
    """The small model with text-conditioned pooling, as --model."""
    content = json.loads((Path(SMALL_LOTLIP[1].removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    content["model_cfg"] |= {"pooling_heads": 2}
    path = tmp_path_factory.mktemp("pooling") / "open_clip_config.json"
    path.write_text(json.dumps(content))
    return f"local-dir:{path.parent}"


# The flags of each training; {name} is a fixture. With one text, FLAIR's random draws have no choice.
TRAININGS = {
    "hn_clip.py": "--siglip",
    "corner_diversity.py": "--lock-image",
    "own": "",
    "flair.py": "--model {pooling} --siglip --text-views sentences(1,corners=no)*3",
    "dreamlip.py": "--lock-image --text-views raw,sentences(1,distinct,corners=no)*3",
    "hard_texts.py": "--hard-texts 2",
    "distillation.py": "--teacher {tiny_clip} --lock-image",
    "regions.py": "--regions 4 --train-data {boxes}",
}


@pytest.mark.parametrize("name", TRAININGS)
def test_it_trains_on_one_and_two_processes_and_resumes_bit_for_bit(name, own, scenes, tmp_path, request):
    path = str(own if name == "own" else EXAMPLES / name)
    argv = [*TRAIN, "--experiment", path, "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    for flag in TRAININGS[name].split():
        argv.append(request.getfixturevalue(flag[1:-1]) if flag.startswith("{") else flag)
    argv = [str(word) for word in argv]
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
    argv += ["--text-views", "sentences(1,corners=no)"] if name == "flair.py" else []
    argv += ["--epochs", "3", "--text-packing", "padded", "--eps", "0.01", "--name"]
    done = run_ranks([*argv, "two", "--batch-size", "20"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*argv, "one", "--batch-size", "20", "--accum-freq", "2"]) == 0
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)


def test_accumulation_and_mixed_precision_work_and_a_dry_run_says_what_it_leaves_out(own, scenes, tmp_path, capsys):
    argv = [*TRAIN, "--experiment", str(own), "--train-data", str(scenes / "train"), "--logs", str(tmp_path)]
    argv += ["--own-number", "1.5", "--batch-size", "10", "--accum-freq", "2", "--epochs", "1", "--name", "run"]
    assert main([*argv, "--precision", "amp_bf16"]) == 0
    assert len(losses(tmp_path, "run")) == 2 and "own" in capsys.readouterr().err
    assert main([*argv, "--dry-run"]) == 0
    assert f"not counted: weights of --experiment {own}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--experiment", str(own), "--help-all"])
    assert "--own-number OWN_NUMBER" in capsys.readouterr().out


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
    for other in (["--experiment", str(EXAMPLES / "hn_clip.py")], []):
        assert main([*argv[:-1], *other, "--epochs", "2"]) == 2
        assert "with which the run was begun" in capsys.readouterr().err
    for name, said in (("none.py", "no such file"), ("json", "expected one subclass"), ("no.such", "No module")):
        with pytest.raises(SystemExit) as stop:
            main([*argv, name])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*TRAIN, "--train-data", "x", "--own-number", "1"])
    assert "unrecognized arguments: --own-number" in capsys.readouterr().err
