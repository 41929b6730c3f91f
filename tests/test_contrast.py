"""The loss in blocks: exact gradients for any block size and number of processes, and no memory of B x B."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_loss import unit
from torch.nn.functional import cross_entropy, logsigmoid

from benchmarks.measure import Setting, peak_bytes
from support import end_ranks, free_ports, start_ranks
from training.loss.blockwise import ContrastRule, contrast
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss


def plain_terms(kind, images, texts, scale, bias):
    """Computes the terms from whole logits matrices, differentiated by autograd."""

    def pair(image, text):
        logits = scale * image @ text.T
        if kind == "softmax":
            target = torch.arange(len(image))
            return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
        return -logsigmoid(sign * (logits + bias)).sum() / len(image)

    long = [pair(images[:, v], texts[:, t]) for v in range(images.shape[1]) for t in range(1, texts.shape[1])]
    return pair(images[:, 0], texts[:, 0]), sum(long)


def inputs(num=9, views=2, num_texts=3, dim=5):
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (6.0, -1.5))
    return [x.requires_grad_() for x in (unit(num, views, dim, seed=1), unit(num, num_texts, dim, seed=2), scale, bias)]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("block_numbers", [1, 30, None])  # a row at a time, 3 x 3 rows, all at once
def test_values_and_gradients_equal_whole_matrices(kind, block_numbers):
    def weighted(terms):
        return 0.3 * terms[0] + 1.7 * terms[1]

    expected, got = inputs(), inputs()
    first = weighted(plain_terms(kind, *expected))
    first.backward()
    images, texts, scale, bias = got
    second = weighted(contrast(images, texts, None, None, scale, bias, ContrastRule(kind, 0, block_numbers)))
    second.backward()
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    for ours, theirs in zip(got[: 3 + (kind == "sigmoid")], expected):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_local", [False, True])
def test_gradients_are_those_of_finite_differences(kind, is_local):
    images, texts, scale, bias = inputs(num=6)
    rule = ContrastRule(kind, 2 if is_local else 0, block_numbers=13)

    def terms(images, texts, scale, bias):
        own = (images[2:5], texts[2:5], images, texts) if is_local else (images, texts, None, None)
        return contrast(*own, scale, bias, rule)

    assert torch.autograd.gradcheck(terms, (images, texts, scale, bias))


def test_a_second_backward_pass_and_a_locked_tower():
    images, texts, scale, _ = inputs()
    total = LongCaptionLoss(block_numbers=20)(images.detach(), texts, scale)
    first = torch.autograd.grad(total, (texts, scale), retain_graph=True)
    second = torch.autograd.grad(total, (texts, scale))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with torch.no_grad():
        assert float(LongCaptionLoss(block_numbers=20)(images, texts, scale)) == pytest.approx(float(total.detach()))


def test_sixteen_bits_are_compared_in_thirty_two():
    images, texts, scale, _ = (x.detach() for x in inputs(num=40, dim=16))
    rounded = [x.bfloat16().requires_grad_() for x in (images, texts)]
    wide = [x.detach().float().requires_grad_() for x in rounded]
    totals = [LongCaptionLoss()(*pair, scale.float()) for pair in (rounded, wide)]
    assert totals[0].dtype == torch.float32 and torch.equal(*totals)
    for total in totals:
        total.backward()
    assert all(torch.equal(a.grad, b.grad.bfloat16()) for a, b in zip(rounded, wide))


def worker(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    for kind in (LongCaptionLoss, LongCaptionSigLipLoss):
        for local in (False, True):
            images, texts, scale, bias = (x.detach().requires_grad_() for x in inputs(num=8, views=1))
            loss = kind(0.8, 1.2, local, True, rank, 2, block_numbers=17)
            own = slice(4 * rank, 4 * rank + 4)
            # a locked image tower: only the texts have gradients
            for is_early in (False, True):
                texts.grad = scale.grad = None
                early = loss.gather_early(images.detach()[own, 0]) if is_early else None
                loss(images.detach()[own], texts[own], scale, bias, early=early).backward()
                results[kind.__name__, local, is_early, rank] = texts.grad.numpy(), scale.grad.numpy()
    torch.distributed.destroy_process_group()


def test_two_processes_with_a_locked_image_tower_equal_one():
    with mp.Manager() as manager:
        results = manager.dict()
        assert end_ranks(start_ranks(worker, 2, free_ports(1)[0], results)) == [0, 0]
        results = dict(results)
    for kind in (LongCaptionLoss, LongCaptionSigLipLoss):
        images, texts, scale, bias = inputs(num=8, views=1)
        kind(0.8, 1.2)(images.detach(), texts, scale, bias).backward()
        for local, is_early in itertools.product((False, True), repeat=2):
            parts = [results[kind.__name__, local, is_early, rank] for rank in (0, 1)]
            torch.testing.assert_close(torch.tensor(parts[0][0] + parts[1][0]) / 2, texts.grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(torch.tensor(parts[0][1] + parts[1][1]) / 2, scale.grad, rtol=0, atol=1e-12)


def peak(num, num_texts, dim, block_numbers):
    """Returns the peak memory of loss and gradients in bytes, in addition to their inputs, by torch's allocator."""
    images = torch.randn(num, 1, dim).requires_grad_()
    texts = torch.randn(num, num_texts, dim).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    work = LongCaptionLoss(block_numbers=block_numbers)
    return peak_bytes(lambda: work(images, texts, scale).backward(), Setting(torch.device("cpu"), True, Path()))


def test_memory_grows_with_the_features_not_with_the_square_of_the_batch():
    block, dim, num_texts = 2**15, 16, 4
    for num in (512, 2048):
        features = 4 * num * dim * num_texts
        got = peak(num, num_texts, dim, block)
        assert features < got < 4 * features + 4 * 4 * block, num  # 16 MB for one matrix of 2,048
