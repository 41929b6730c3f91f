"""A step and its parts against plain implementations: accumulation with dropout, parameter groups, schedules."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from training.loss.caption_loss import LongCaptionLoss
from training.train.optim import make_schedule, parameter_groups
from training.train.step import LOGIT_SCALE_MAX, Stepper


class Towers(nn.Module):
    """Two linear towers with dropout, with the interface of `TrainModel`."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.dropout = nn.Linear(6, 4), nn.Linear(5, 4), nn.Dropout(0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(7.0)))
        self.double()

    def forward(self, image, text, long_text):
        texts = torch.cat([self.text(text)[:, None], self.text(long_text)], dim=1)
        return {
            "image_features": normalize(self.dropout(self.image(image)), dim=-1),
            "text_features": normalize(self.dropout(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def batches(count: int, size: int = 4) -> list[dict]:
    stream = torch.Generator().manual_seed(3)
    shapes = {"image": (size, 6), "text": (size, 5), "long_text": (size, 2, 5)}
    return [
        {name: torch.randn(shape, generator=stream, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def stepper(model: nn.Module, lr: float = 0.1, **options) -> Stepper:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Stepper(model, model, LongCaptionLoss(0.7, 1.3), optimizer, **options)


def test_accumulation_with_dropout_equals_one_graph_over_all_micro_batches():
    torch.manual_seed(0)
    model = Towers()
    expected = copy.deepcopy(model)
    data = batches(3)

    torch.manual_seed(1)
    outputs = [expected(**batch) for batch in data]
    joined = {name: torch.cat([o[name] for o in outputs]) for name in ("image_features", "text_features")}
    loss = LongCaptionLoss(0.7, 1.3)(**joined, logit_scale=expected.logit_scale.exp())
    loss.backward()

    torch.manual_seed(1)
    report = stepper(model, lr=0.0)(data)
    assert len(torch.unique(joined["text_features"])) > 10  # dropout left enough different features to compare
    # The loss gets features in float32.
    assert float(report["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    for (name, got), wanted in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("count", [1, 3])
def test_only_the_towers_are_computed_in_the_arithmetic_of_the_towers(count):
    """On a GPU, they multiply in TF32; the loss, forward and backward, in float32."""
    inside, seen = [False], Counter()

    @contextmanager
    def arithmetic() -> Iterator[None]:
        before, inside[0] = inside[0], True
        yield
        inside[0] = before

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, who):
            ctx.who = who
            seen[who, "forward", inside[0]] += 1
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen[ctx.who, "backward", inside[0]] += 1
            return gradient, None

    class RecordedTowers(Towers):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            return output | {"image_features": Recorded.apply(output["image_features"], "towers")}

    class RecordedLoss(LongCaptionLoss):
        def forward(self, image_features, **inputs):
            return super().forward(Recorded.apply(image_features, "loss"), **inputs)

    model = RecordedTowers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Stepper(model, model, RecordedLoss(0.7, 1.3), optimizer, arithmetic=arithmetic)(batches(count))
    assert {(who, step): is_inside for who, step, is_inside in seen} == {
        ("towers", "forward"): True,
        ("towers", "backward"): True,
        ("loss", "forward"): False,
        ("loss", "backward"): False,
    }
    assert len(seen) == 4 and seen["towers", "backward", True] == count


class MarginStepper(Stepper):
    """The example of CONTRIBUTING.md."""

    def compute_loss(self, output, others):
        terms = super().compute_loss(output, others)
        matched = (output["image_features"] * output["text_features"][:, 0]).sum(dim=-1)
        return terms | {"margin_loss": 0.1 * (0.3 - matched).clamp(min=0).mean()}


@pytest.mark.parametrize("count", [1, 3])
def test_a_custom_loss_is_minimised_and_logged(count):
    model = Towers().eval()
    reference = copy.deepcopy(model)
    data = batches(count)
    step = MarginStepper(model, model, LongCaptionLoss(0.7, 1.3), torch.optim.SGD(model.parameters(), lr=0.0))
    report = step(data)
    whole = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    output = reference(**whole)
    matched = (output["image_features"] * output["text_features"][:, 0]).sum(dim=-1)
    margin = 0.1 * (0.3 - matched).clamp(min=0).mean()
    terms = LongCaptionLoss(0.7, 1.3)(**output, output_dict=True)
    (sum(terms.values()) + margin).backward()
    assert float(report["margin_loss"]) == pytest.approx(float(margin.detach()), rel=1e-5)
    for (name, got), wanted in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


class RankingTowers(Towers):
    """Two further outputs: a score for each image, and a scalar of the batch; both with a graph."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        scores = self.image(inputs["image"])[:, :3]
        return output | {"scores": scores, "penalty": scores.square().mean()}


class RankingLoss(nn.Module):
    """A loss with a parameter of its own, which draws random numbers and uses all outputs."""

    def __init__(self):
        super().__init__()
        self.contrast, self.direction = LongCaptionLoss(0.7, 1.3), nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, scores, penalty, output_dict, **output):
        ranks = (scores @ self.direction) * torch.rand(len(scores))
        terms = self.contrast(**output, output_dict=output_dict)
        return terms | {"rank_loss": (ranks.softmax(0) * torch.arange(len(scores))).sum(), "size_loss": 0.3 * penalty}


def test_accumulation_counts_further_outputs_and_parameters_of_the_loss_once():
    model = RankingTowers().eval()
    whole = {name: torch.cat([batch[name] for batch in batches(2)]) for name in batches(1)[0]}
    found = []
    for data in (batches(2), [whole]):
        own, loss = copy.deepcopy(model), RankingLoss()
        torch.manual_seed(5)
        optimizer = torch.optim.SGD([*own.parameters(), *loss.parameters()], lr=0.0)
        report = Stepper(own, own, loss, optimizer)(data)
        found.append((report, {n: p.grad for n, p in [*own.named_parameters(), *loss.named_parameters()]}))
    (accumulated, gradients), (at_once, expected) = found
    assert gradients.keys() == expected.keys() and float(expected["direction"].abs().max()) > 0.01
    for name in ("loss", "rank_loss", "size_loss"):
        assert float(accumulated[name]) == pytest.approx(float(at_once[name]), rel=1e-6), name
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (torch.zeros(7, 2), r"output extra of the model has the shape \[7, 2\]; expected a tensor with 4 rows"),
        ("words", "output extra of the model has the type str; expected a tensor with 4 rows"),
    ],
)
def test_accumulation_refuses_an_output_that_it_can_not_join(extra, said):
    class Odd(Towers):
        def forward(self, **inputs):
            return super().forward(**inputs) | {"extra": extra}

    with pytest.raises(ValueError, match=said):
        stepper(Odd())(batches(2))


def test_the_gradient_norm_is_measured_before_it_is_clipped():
    model = Towers().eval()
    before = copy.deepcopy(model)
    free = float(stepper(copy.deepcopy(model))(batches(1))["grad_norm"])
    report = stepper(model, lr=1.0, max_norm=free / 4)(batches(1))
    moved = math.sqrt(
        sum(float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), before.parameters()))
    )
    assert float(report["grad_norm"]) == pytest.approx(free) and moved == pytest.approx(free / 4, rel=1e-5)


def test_the_logit_scale_stays_at_most_a_hundred():
    model = Towers().eval()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    report = stepper(model, lr=0.0)(batches(1))
    assert (
        float(model.logit_scale.detach()) == pytest.approx(LOGIT_SCALE_MAX) and float(report["logit_scale"]) <= 100.001
    )


def groups_by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_parameter_groups_and_rates_of_a_real_model():
    import training

    model, _, _ = training.create_model_and_transforms("lotlip_tiny", pretrained_text=False)
    model.visual.conv1.weight.requires_grad_(False)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.2, image_lr=1e-4, text_lr=None)
    found = groups_by_name(model, groups)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, group in found.items():
        small = model.get_parameter(name).ndim < 2 or any(word in name for word in ("ln", "bias"))
        assert group["weight_decay"] == (0.0 if small else 0.2), name
        assert group["lr"] == (1e-4 if name.startswith("visual.") else 1e-3), name
    assert found["logit_scale"]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["cosine", "const"])
def test_schedules(name):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.1, "lr_scale": 0.5}])
    schedule = make_schedule(optimizer, name, lr=0.2, warmup=4, total_steps=14)
    rates = [schedule(step) for step in range(14)]
    assert rates[:4] == pytest.approx([0.05, 0.10, 0.15, 0.20])
    after = [0.2 * (1 + math.cos(math.pi * k / 10)) / 2 if name == "cosine" else 0.2 for k in range(10)]
    assert rates[4:] == pytest.approx(after)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1] / 2)


def test_a_locked_image_tower_encodes_each_image_once():
    """The result of the step is the same as when images go through the model, which encodes them twice."""
    import training
    from training.model.towers.train_model import TrainModel

    torch.manual_seed(0)
    start = training.create_model("lotlip_tiny", pretrained_text=False).eval()
    start.lock_image_tower()
    stream = torch.Generator().manual_seed(1)
    data = []
    for _ in range(2):
        ids = torch.randint(1000, 2000, (4, 2, 12), generator=stream)
        images = torch.randn(4, 3, 64, 64, generator=stream)
        data.append({"image": images, "text": ids[:, 0], "long_text": ids[:, 1:]})
    norms, calls = [], []
    for apart in (False, True):
        core = copy.deepcopy(start)
        model = TrainModel(core)
        core.visual.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
        step = stepper(core, lr=0.1, locked_images=model.encode_images if apart else None)
        step.model = model
        norms += [float(step(data)["grad_norm"])]
    assert calls == [4] * 3 + [4] * 2  # the last micro-batch keeps its graph, the first is encoded again
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
