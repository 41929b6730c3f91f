"""Terms, label smoothing and reduced features against plain implementations of the published formulas."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_loss import unit
from torch.nn.functional import cross_entropy

from support import SMALL_LOTLIP, end_ranks, free_ports, start_ranks
from training.data.captions import parse_views
from training.flags.parser import parse_args
from training.loss import LongCaptionLoss, LongCaptionSigLipLoss, LossTerm
from training.loss.caption_loss import reduce_features
from training.runtime.distributed import DistEnv
from training.train.build import make_loss

RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
LONG_CLIP = (
    LossTerm("long_loss", (1,)),
    LossTerm("short_loss", (0,), image_form=partial(reduce_features, components=3)),
)
SCALE = 9.0


def plain_reduction(features, components):
    """Reduces features as Long-CLIP does, with a singular value decomposition that autograd differentiates."""
    mean = features.mean(0)
    _, _, directions = torch.linalg.svd(features - mean, full_matrices=False)
    return (features - mean) @ directions[:components].T @ directions[:components] + mean


def plain_pair(images, texts, smoothing=0.0):
    target = torch.arange(len(images))
    logits = SCALE * images @ texts.T
    return sum(cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.T)) / 2


def long_clip(images, texts):
    short, long = texts[:, 0], texts[:, 1]
    return plain_pair(images, long, 0.1), plain_pair(plain_reduction(images, 3), short, 0.1)


def batch(num=10, num_texts=2):
    return [unit(num, 6, seed=0).requires_grad_(), unit(num, num_texts, 6, seed=1).requires_grad_()]


def check_equal(got, expected, got_inputs, inputs):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for ours, plain in zip(torch.autograd.grad(got, got_inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("block_numbers", [1, 35, None])
def test_the_loss_of_long_clip(block_numbers):
    """Compares value and gradients: both captions with smoothing, the short one against reduced images."""
    inputs, own = batch(), batch()
    loss = LongCaptionLoss(block_numbers=block_numbers, terms=LONG_CLIP, label_smoothing=0.1, normalisation="per-term")
    terms = loss(*own, torch.tensor(SCALE, dtype=torch.float64), output_dict=True)
    assert list(terms) == ["long_loss", "short_loss"]
    for value, plain in zip(terms.values(), long_clip(*inputs)):
        torch.testing.assert_close(value, plain, rtol=0, atol=1e-10)
    check_equal(sum(terms.values()), sum(long_clip(*inputs)), own, inputs)


def himo_components(texts, variance):
    """Reduces texts to the fewest components that explain this fraction of the variance."""
    squares = torch.linalg.svdvals(texts - texts.mean(0)).square()
    enough = [k for k in range(1, len(squares) + 1) if squares[:k].sum() >= variance * squares.sum()][0]
    assert 1 < enough < len(squares) - 1
    return plain_reduction(texts, enough)


def himo_clip(images, texts, variance):
    return plain_pair(images, texts, 0.1) + plain_pair(images, himo_components(texts, variance), 0.1)


def test_the_loss_of_himo_clip():
    def plain(images, texts):
        return himo_clip(images, texts[:, 0], 0.8)

    inputs, own = batch(), batch()
    terms = (
        LossTerm("whole_loss", (0,)),
        LossTerm("component_loss", (0,), text_form=partial(reduce_features, variance=0.8)),
    )
    loss = LongCaptionLoss(terms=terms, label_smoothing=0.1, normalisation="per-term")
    check_equal(loss(*own, torch.tensor(SCALE, dtype=torch.float64)), plain(*inputs), own, inputs)


def test_reduction_of_a_small_batch_is_the_identity_and_of_equal_directions_finite():
    rows = unit(4, 6, seed=2)
    assert torch.equal(reduce_features(rows, 3), rows)
    assert torch.linalg.matrix_rank(reduce_features(rows, 2) - rows.mean(0)) == 2  # one component fewer than there are
    many = unit(10, 6, seed=2).requires_grad_()  # all 6 directions
    reduce_features(many, 8).square().sum().backward()
    torch.testing.assert_close(many.grad, 2 * many.detach())
    # Two of the chosen directions have the same variance: the gradient of a plain decomposition is infinite there.
    square = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1]]).requires_grad_()
    reduce_features(square, 2).square().sum().backward()
    assert square.grad.isfinite().all()
    rows = unit(8, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reduce_features(x, 2), rows)


def test_weights_and_normalisations():
    images, texts = batch(num_texts=4)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    single = [plain_pair(images, texts[:, t]) for t in range(4)]
    terms = (LossTerm("raw_loss", (0,), 0.5), LossTerm("long_loss", (1, 2), 2.0), LossTerm("first_loss", (3,)))
    published = LongCaptionLoss(terms=terms)(images, texts, scale, output_dict=True)
    own = LongCaptionLoss(terms=terms, normalisation="per-term")(images, texts, scale, output_dict=True)
    sums = {"raw_loss": 0.5 * single[0], "long_loss": 2 * (single[1] + single[2]), "first_loss": single[3]}
    for name, total in sums.items():
        torch.testing.assert_close(published[name], total / 4)
        torch.testing.assert_close(own[name], total / (2 if name == "long_loss" else 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalisation": "none"}, "normalisation none: expected one of published, per-term"),
        ({"terms": (LossTerm("a_loss", (0,)), LossTerm("a_loss", (1,)))}, "term a_loss: another one has this name"),
    ],
)
def test_invalid_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LongCaptionLoss(**options)
    with pytest.raises(ValueError, match="label smoothing is defined for the softmax loss only"):
        LongCaptionSigLipLoss(label_smoothing=0.1)


def worker(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    images, texts = batch()
    own = slice(5 * rank, 5 * rank + 5)
    loss = LongCaptionLoss(terms=LONG_CLIP, label_smoothing=0.1, normalisation="per-term", rank=rank, world_size=2)
    total = loss(images[own], texts[own], torch.tensor(SCALE, dtype=torch.float64))
    total.backward()
    results[rank] = float(total), images.grad.numpy(), texts.grad.numpy()
    torch.distributed.destroy_process_group()


def test_two_processes_reduce_each_its_own_batch():
    """As in Long-CLIP, components are those of the local batch; then the rows of all ranks are compared."""
    with mp.Manager() as manager:
        results = manager.dict()
        assert end_ranks(start_ranks(worker, 2, free_ports(1)[0], results)) == [0, 0]
        (first, *grads), (second, *other_grads) = results[0], results[1]
    images, texts = batch()
    reduced = torch.cat([plain_reduction(part, 3) for part in images.split(5)])
    total = plain_pair(images, texts[:, 1], 0.1) + plain_pair(reduced, texts[:, 0], 0.1)
    assert (first + second) / 2 == pytest.approx(float(total.detach()), abs=1e-10)
    for ours, more, plain in zip(grads, other_grads, torch.autograd.grad(total, (images, texts))):
        torch.testing.assert_close(torch.tensor(ours + more) / 2, plain, rtol=0, atol=1e-9)


def test_terms_may_share_texts():
    inputs, own = batch(num_texts=3), batch(num_texts=3)
    terms = (LossTerm("all_loss", (0, 1, 2)), LossTerm("first_loss", (0,), 3.0), LossTerm("last_loss", (2, 1)))
    total = LongCaptionLoss(terms=terms)(*own, torch.tensor(SCALE, dtype=torch.float64))
    single = [plain_pair(inputs[0], inputs[1][:, t]) for t in range(3)]
    check_equal(total, (4 * single[0] + 2 * single[1] + 2 * single[2]) / 3, own, inputs)


def test_flags_of_long_clips_recipe(scenes, tmp_path):
    """Terms have the declared names, and a locked logit scale keeps the value of --logit-scale."""
    from test_train import read_metrics

    from training.main import main

    argv = [*SMALL_LOTLIP, "--train-data", str(scenes / "train"), "--batch-size", "20", "--epochs", "1"]
    argv += ["--warmup", "0", "--workers", "0", "--log-every-n-steps", "1", "--logs", str(tmp_path), "--name", "run"]
    argv += ["--text-views", "short, long(weight=0.5)", "--label-smoothing", "0.1", "--loss-normalisation", "per-term"]
    assert main([*argv, "--short-image-components", "8", "--logit-scale", "50", "--lock-logit-scale"]) == 0
    lines = [line for line in read_metrics(tmp_path, "run") if "train/loss" in line]
    assert [line["train/logit_scale"] for line in lines] == pytest.approx([50.0, 50.0], rel=1e-5)
    for line in lines:
        assert line["train/loss"] == pytest.approx(line["train/short_loss"] + line["train/long_loss"], rel=1e-5)
    for wrong in (["--label-smoothing", "1"], ["--siglip"]):
        with pytest.raises(SystemExit) as stop:
            main([*argv, *wrong])
        assert stop.value.code == 2


FLAGS_OF_VARIANCE = {
    "raw, long*2": lambda i, t: (
        [plain_pair(i, t[:, 0]), 2 * (plain_pair(i, t[:, 1]) + plain_pair(i, t[:, 2])) / 2],
        [6 * (plain_pair(i, himo_components(t[:, 1], 0.7)) + plain_pair(i, himo_components(t[:, 2], 0.7))) / 2],
    ),
    "": lambda i, t: (
        [plain_pair(i, t[:, 0]), 2 * sum(plain_pair(i, t[:, k]) for k in (1, 2, 3)) / 3],
        [6 * sum(plain_pair(i, himo_components(t[:, k], 0.7)) for k in (1, 2, 3)) / 3],
    ),
    "raw": lambda i, t: ([plain_pair(i, t[:, 0])], []),
}


@pytest.mark.parametrize("views", FLAGS_OF_VARIANCE)
def test_flags_add_a_term_of_reduced_texts_to_each_term_of_long_captions(views, capsys):
    """Each term of long captions has weight 2 here; a term of components with 3 times that weight follows it."""
    argv = [
        "--train-data",
        "d.tar",
        "--text-views",
        views,
        "--loss-normalisation",
        "per-term",
        "--long-loss-weight",
        "2",
    ]
    args = parse_args([*argv, "--long-text-variance", "0.7", "--long-text-variance-weight", "3"])
    assert ("--long-text-variance, --long-text-variance-weight: no effect" in capsys.readouterr().err) == (
        views == "raw"
    )
    sides = [[unit(40, 12, seed=0).requires_grad_(), unit(40, 4, 12, seed=1).requires_grad_()] for _ in "ab"]
    num_texts = {"raw, long*2": 3, "": 4, "raw": 1}[views]
    loss = make_loss(args, 0, DistEnv(0, 1, torch.device("cpu")))
    images, texts = sides[0][0], sides[0][1][:, :num_texts]
    terms = loss(images, texts, torch.tensor(SCALE, dtype=torch.float64), output_dict=True)
    assert [name for name in terms if "component" in name] == {
        "raw, long*2": ["long_component_loss"],
        "": ["long_caption_component_loss"],
        "raw": [],
    }[views]
    whole, reduced = FLAGS_OF_VARIANCE[views](*sides[1])
    check_equal(sum(terms.values()), sum([*whole, *reduced]), *sides)


@pytest.mark.parametrize("variance", ["0", "1", "nan"])
def test_a_share_of_variance_lies_between_0_and_1(variance, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--train-data", "d.tar", "--long-text-variance", variance])
    assert stop.value.code == 2
    assert f"--long-text-variance {variance}: expected a fraction between 0 and 1" in capsys.readouterr().err


def plain_sigmoid(images, texts):
    """Computes SigLIP's loss: the mean over images of the negative log-likelihoods of all pairs."""
    signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -torch.nn.functional.logsigmoid(signs * (SCALE * images @ texts.T + BIAS)).sum() / len(images)


BIAS = -10.0
OF_RECIPES = {
    "clip": lambda i, t: plain_pair(i, t[:, 0]),
    "dreamlip": lambda i, t: sum(plain_pair(i, t[:, k]) for k in range(7)) / 7,
    "flair": lambda i, t: sum(plain_sigmoid(i, t[:, k]) for k in range(8)) / 8,
    "finetune-openai-clip": lambda i, t: sum(plain_pair(i, t[:, k]) for k in range(2)) / 2,
    "long-clip": lambda i, t: plain_pair(plain_reduction(i, 32), t[:, 0], 0.1) + plain_pair(i, t[:, 1], 0.1),
    "debias-clip": lambda i, t: (
        0.1 * plain_pair(plain_reduction(i, 32), t[:, 0], 0.1) + 0.9 * plain_pair(i, t[:, 1], 0.1)
    ),
    "himo-clip": lambda i, t: himo_clip(i, t[:, 0], 0.9),
    "lit": lambda i, t: plain_pair(i, t[:, 0]),
    "lotlip-cc3m": lambda i, t: sum(plain_pair(i, t[:, k]) for k in range(10)) / 10,  # 1 raw text, 3 x (1 + 2 corners)
}


@pytest.mark.parametrize("name", OF_RECIPES)
def test_a_recipes_loss_is_the_published_formula(name):
    """Compares value and gradients, with the loss built from the recipe's file."""
    args = parse_args(["--train-data", "d.tar", "--config", str(RECIPES / f"{name}.yaml"), "--name", "own"])
    corners = 2 if name == "lotlip-cc3m" else 0
    loss = make_loss(args, corners, DistEnv(0, 1, torch.device("cpu")))
    num_texts = sum(entry.count * (1 + corners * entry.corners) for entry in parse_views(args.text_views))
    sides = [[unit(40, 48, seed=0).requires_grad_(), unit(40, num_texts, 48, seed=1).requires_grad_()] for _ in "ab"]
    scalars = {"logit_scale": torch.tensor(SCALE, dtype=torch.float64)}
    if args.siglip:
        scalars["logit_bias"] = torch.tensor(BIAS, dtype=torch.float64)
    check_equal(loss(*sides[0], **scalars), OF_RECIPES[name](*sides[1]), *sides)
