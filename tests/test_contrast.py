"""The loss in blocks: exact gradients for any block size and number of processes; memory of the features only."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_loss import unit
from torch.nn.functional import cross_entropy as cross_entropy_of_logits
from torch.nn.functional import logsigmoid

from benchmarks.measure import Setting, peak_bytes
from support import end_ranks, free_ports, start_ranks
from training.loss.blockwise import cross_entropy, in_blocks, sigmoid_loss, similarities
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss


def plain_terms(kind, images, texts, scale, bias):
    """Computes the terms from whole logits matrices, differentiated by autograd."""

    def pair(image, text):
        logits = scale * image @ text.T
        if kind == "softmax":
            target = torch.arange(len(image))
            return sum(cross_entropy_of_logits(x, target) for x in (logits, logits.T)) / 2
        sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
        return -logsigmoid(sign * (logits + bias)).sum() / len(image)

    long = [pair(images[:, v], texts[:, t]) for v in range(images.shape[1]) for t in range(1, texts.shape[1])]
    return pair(images[:, 0], texts[:, 0]), sum(long)


def inputs(num=9, views=2, num_texts=3, dim=5):
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (6.0, -1.5))
    return [x.requires_grad_() for x in (unit(num, views, dim, seed=1), unit(num, num_texts, dim, seed=2), scale, bias)]


LOSSES = {"softmax": LongCaptionLoss, "sigmoid": LongCaptionSigLipLoss}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("block_numbers", [1, 30, None])  # a row at a time, 3 x 3 rows, all at once
def test_values_and_gradients_equal_whole_matrices(kind, block_numbers):
    expected, got = inputs(), inputs()
    short, long = plain_terms(kind, *expected)
    first = (0.3 * short + 1.7 * long / 2) / 3  # 2 views, 3 texts
    first.backward()
    second = LOSSES[kind](0.3, 1.7, block_numbers=block_numbers)(*got)
    second.backward()
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    for ours, theirs in zip(got[: 3 + (kind == "sigmoid")], expected):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_are_those_of_finite_differences(kind):
    """Of rows 2 to 4 of six, compared with all; twice, because autograd differentiates the gradient, too."""
    images, texts, scale, bias = inputs(num=6, num_texts=2)

    def loss(images, texts, scale, bias):
        keys, targets, sizes = texts.unbind(1), torch.arange(2, 5), {"block_numbers": 13}
        if kind == "sigmoid":
            return sigmoid_loss(images[2:5, 0], keys, targets, scale, bias, **sizes)
        return cross_entropy(images[2:5, 0], keys, targets, scale, smoothing=0.2, **sizes)

    assert torch.autograd.gradcheck(loss, (images, texts, scale, bias))
    assert torch.autograd.gradgradcheck(loss, (images, texts, scale, bias))


def test_a_loss_of_ones_own_is_a_function_of_a_blocks_logits():
    """Soft targets, and hard negatives as further keys: as the plain formulas, though no logits matrix is kept."""
    images, texts, scale, _ = inputs(num=7)
    soft = torch.rand(7, 14, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(1)

    def compare(rows, keys, scale):
        own, wanted = rows
        return cross_entropy_of_logits(similarities(own, keys, scale).flatten(1), wanted, reduction="none")

    keys = [texts[:, 0], texts[:, 1]]  # the second text as negatives
    blocks = in_blocks(compare, (images[:, 0], soft), keys, scale, block_numbers=30)
    assert len(blocks) == 4
    got = torch.cat(blocks).mean()
    expected = -(soft * (scale * images[:, 0] @ torch.cat(keys).T).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for ours, plain in zip(*(torch.autograd.grad(x, (images, texts, scale)) for x in (got, expected))):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


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
            loss(images.detach()[own], texts[own], scale, bias).backward()
            results[kind.__name__, local, rank] = texts.grad.numpy(), scale.grad.numpy()
    torch.distributed.destroy_process_group()


def test_two_processes_with_a_locked_image_tower_equal_one():
    with mp.Manager() as manager:
        results = manager.dict()
        assert end_ranks(start_ranks(worker, 2, free_ports(1)[0], results)) == [0, 0]
        results = dict(results)
    for kind in (LongCaptionLoss, LongCaptionSigLipLoss):
        images, texts, scale, bias = inputs(num=8, views=1)
        kind(0.8, 1.2)(images.detach(), texts, scale, bias).backward()
        for local in (False, True):
            parts = [results[kind.__name__, local, rank] for rank in (0, 1)]
            torch.testing.assert_close(torch.tensor(parts[0][0] + parts[1][0]) / 2, texts.grad, rtol=0, atol=1e-12)
            torch.testing.assert_close(torch.tensor(parts[0][1] + parts[1][1]) / 2, scale.grad, rtol=0, atol=1e-12)


def peak(num, num_texts, dim, block_numbers):
    """Returns the peak memory of loss and gradients in bytes, in addition to their inputs, by torch's allocator."""
    images = torch.randn(num, 1, dim).requires_grad_()
    texts = torch.randn(num, num_texts, dim).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    work = LongCaptionLoss(block_numbers=block_numbers)
    return peak_bytes(lambda: work(images, texts, scale).backward(), Setting(torch.device("cpu"), True, Path()))


def test_memory_is_at_most_a_tenth_of_whole_matrices_and_does_not_grow_with_them():
    num_texts, got = 4, {}
    for num in (1024, 2048):
        got[num] = peak(num, num_texts, dim=16, block_numbers=2**16)
        whole = 2 * 4 * num * num * num_texts  # the plain loss keeps two softmaxes of each matrix
        assert 4 * num * num_texts * 16 < got[num] < whole / 10, num
    assert got[2048] < 3 * got[1024]
