"""The loss against the published terms and gradients, plain formulas, and several processes against one."""

import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from support import REFERENCE, end_ranks, free_ports, start_ranks
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss, gather_rows

SAVED = np.load(REFERENCE / "losses.npz")
CASES = sorted({name.rsplit("/", 1)[0] for name in SAVED if name.endswith("/total")})


@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_equal_the_published_loss(case):
    size, kind, long_on, weights = case.split("_", 3)[0], *case.split("_", 3)[1:]
    short, long = (float(w) for w in weights.removeprefix("w").split("_"))
    base = f"{size}_{kind}"
    image = torch.tensor(SAVED[f"{base}/I"], requires_grad=True)
    text = torch.tensor(SAVED[f"{base}/X"], requires_grad=True)
    scale = torch.tensor(float(SAVED["logit_scale"]), dtype=image.dtype, requires_grad=True)
    loss = LongCaptionLoss(short, long if long_on == "long1" else 0.0)
    terms = loss(image, text, scale, output_dict=True)
    total = loss(image, text, scale)
    total.backward()
    expected = {"short_caption_loss": "CLIP_loss", "long_caption_loss": "DeCLIP_loss"}
    expected["contrastive_loss"] = "contrastive_loss"
    for ours, theirs in expected.items():
        if ours in terms and f"{case}/{theirs}" in SAVED:
            assert float(terms[ours].detach()) == pytest.approx(float(SAVED[f"{case}/{theirs}"]), abs=1e-9)
    assert float(total.detach()) == pytest.approx(float(SAVED[f"{case}/total"]), abs=1e-9)
    for ours, theirs in ((image, "dI"), (text, "dX"), (scale, "ds")):
        np.testing.assert_allclose(ours.grad, SAVED[f"{case}/{theirs}"], rtol=0, atol=1e-9)


def unit(*shape, seed):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def test_equals_a_plain_formula_with_views():
    image, text = unit(6, 2, 8, seed=0), unit(6, 4, 8, seed=1)
    terms = LongCaptionLoss(0.5, 2.0)(image, text, torch.tensor(7.0), output_dict=True)

    def ce2(v, t):
        logits = 7.0 * image[:, v] @ text[:, t].T
        return -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()).mean()

    assert float(terms["short_caption_loss"]) == pytest.approx(0.5 * float(ce2(0, 0)) / 8)
    long = sum(float(ce2(v, t)) for v in range(2) for t in (1, 2, 3)) / 2
    assert float(terms["long_caption_loss"]) == pytest.approx(2.0 * long / 8)


def test_siglip_equals_open_clips_and_sums_over_captions():
    from open_clip.loss import SigLipLoss

    image, text = unit(6, 8, seed=0), unit(6, 3, 8, seed=1)
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    single = [SigLipLoss()(image, text[:, t], scale, bias) for t in range(3)]
    terms = LongCaptionSigLipLoss()(image, text, scale, bias, output_dict=True)
    assert float(terms["short_caption_loss"]) == pytest.approx(float(single[0]) / 3)
    assert float(terms["long_caption_loss"]) == pytest.approx(float(single[1] + single[2]) / 3)
    assert float(LongCaptionSigLipLoss()(image, text[:, 0], scale, bias)) == pytest.approx(float(single[0]))


def gradients(kind, image, text, **options):
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    scale = torch.tensor(9.0, dtype=image.dtype, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=image.dtype, requires_grad=True)
    loss = {"softmax": LongCaptionLoss, "sigmoid": LongCaptionSigLipLoss}[kind](0.8, 1.2, **options)
    total = loss(image, text, scale, bias)
    total.backward()
    return total.detach(), image.grad, text.grad, scale.grad, bias.grad


def worker(rank, world_size, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    for num_texts in (0, 4):
        image, text = unit(8, 12, seed=5), unit(8, *([num_texts] if num_texts else []), 12, seed=6)
        rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        for kind in ("softmax", "sigmoid"):
            for local in (False, True):
                options = {"local_loss": local, "rank": rank, "world_size": world_size}
                got = gradients(kind, image[rows], text[rows], **options)
                results[(rank, num_texts, kind, local)] = tuple(None if g is None else g.numpy() for g in got)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_equal_one(world_size):
    with mp.Manager() as manager:
        results = manager.dict()
        assert end_ranks(start_ranks(worker, world_size, world_size, free_ports(1)[0], results)) == [0] * world_size
        results = dict(results)
    for num_texts in (0, 4):
        image, text = unit(8, 12, seed=5), unit(8, *([num_texts] if num_texts else []), 12, seed=6)
        for kind in ("softmax", "sigmoid"):
            total, d_image, d_text, d_scale, d_bias = gradients(kind, image, text)
            for local in (False, True):
                parts = [results[(rank, num_texts, kind, local)] for rank in range(world_size)]
                # DDP averages the gradients of parameters; a rank's features only reach the parameters of that rank.
                assert np.mean([p[0] for p in parts]) == pytest.approx(float(total), abs=1e-12)
                np.testing.assert_allclose(np.concatenate([p[1] for p in parts]) / world_size, d_image, atol=1e-12)
                np.testing.assert_allclose(np.concatenate([p[2] for p in parts]) / world_size, d_text, atol=1e-12)
                assert np.mean([p[3] for p in parts]) == pytest.approx(float(d_scale), abs=1e-12)
                if kind == "sigmoid":
                    assert np.mean([p[4] for p in parts]) == pytest.approx(float(d_bias), abs=1e-12)


def rounding_worker(rank, port, results):
    """Loss and gradients with features that travel in 16 bits, and what the gather returned."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    for dtype in (torch.bfloat16, torch.float16):
        image, text = unit(8, 12, seed=5)[rows], unit(8, 4, 12, seed=6)[rows]
        got = gradients("softmax", image, text, rank=rank, world_size=2, gather_dtype=dtype)
        everyone = gather_rows(text, 2, dtype)
        results[(rank, str(dtype))] = (*(g.numpy() for g in got[:4]), everyone.numpy())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_features_that_travel_in_16_bits():
    """The others' rows are rounded once, and the loss and its gradients nearly those of exact features."""
    with mp.Manager() as manager:
        results = manager.dict()
        assert end_ranks(start_ranks(rounding_worker, 2, free_ports(1)[0], results)) == [0, 0]
        results = dict(results)
    image, text = unit(8, 12, seed=5), unit(8, 4, 12, seed=6)
    total, d_image, d_text, d_scale, _ = gradients("softmax", image, text)
    for dtype, error in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        parts = [results[(rank, str(dtype))] for rank in (0, 1)]
        for *_, everyone in parts:
            np.testing.assert_array_equal(everyone, text.to(dtype).double())
        got = np.mean([p[0] for p in parts])
        assert 0 < abs(got - float(total)) < error * float(total)
        for k, exact in ((1, d_image), (2, d_text)):
            both = np.concatenate([p[k] for p in parts]) / 2
            np.testing.assert_allclose(both, exact, rtol=0, atol=9 * error * float(exact.abs().max()))


def test_published_two_process_totals():
    saved = np.load(REFERENCE / "distributed" / "distributed_losses.npz")
    for case in json.loads((REFERENCE / "distributed" / "distributed_losses.json").read_text()):
        if any(part["errors"] != [None, None] for part in case["per_rank"]) or "single_process_total" not in case:
            continue
        image, text = (torch.tensor(saved[f"{case['inputs']}_{name}"]) for name in ("image", "text"))
        image, text = image.flatten(0, -2).reshape(8, -1), text.reshape(8, *text.shape[-(case["inputs"] != "T0") - 1 :])
        long_weight = case["declip_lossweight"] if case["use_declip_loss"] else 0.0
        loss = LongCaptionLoss(case["clip_lossweight"], long_weight)
        total = loss(image, text, torch.tensor(case["logit_scale"], dtype=image.dtype))
        assert float(total) == pytest.approx(case["single_process_total"], abs=1e-5), case["id"]
