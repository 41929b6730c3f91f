"""--torchcompile: each layer on its own, with the results of eager layers, and no compilation for other lengths."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from test_packing import CPU, draw
from test_text_encoder import stock
from torch._dynamo.utils import counters

import training
from support import end_ranks, free_ports, set_rank, start_ranks
from training.loss.caption_loss import LongCaptionLoss
from training.model.assembly.from_flags import make_arranger
from training.model.packing import Captions
from training.model.tokenizers import CornerCLIPTokenizer
from training.model.towers.clip_tower import CornerCLIPText
from training.model.towers.compiling import compile_layers
from training.model.towers.train_model import TrainModel
from training.train.step import Stepper


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return training.create_model("lotlip_tiny", pretrained_text=False)


def clip() -> torch.nn.Module:
    model = stock("custom text")
    model.text = CornerCLIPText(model.text, 2)
    return model


def captions_of_step(model: torch.nn.Module, step: int) -> Captions:
    """Returns 2 short and 6 long captions, packed; their lengths and the number of buckets differ between steps."""
    lengths = torch.randint(2, 12 + 12 * step, (8,), generator=torch.Generator().manual_seed(step)).tolist()
    if isinstance(model.text, CornerCLIPText):
        ids = CornerCLIPTokenizer(77, 2)(["a " * length for length in lengths])
    else:
        ids = draw(model.text, 8, max(lengths), 4, seed=step)
    return make_arranger(model, "auto", CPU)(ids[:2], ids[2:].unflatten(0, (2, 3)))


def run(model: torch.nn.Module, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns features with and without a graph, as for accumulation, and the gradients."""
    images = torch.randn(2, model.visual.output_dim, generator=torch.Generator().manual_seed(step))
    inputs = {"image_features": images, "packed_text": captions_of_step(model, step)}
    with torch.no_grad():
        alone = TrainModel(model)(**inputs)["text_features"]
    features = TrainModel(model)(**inputs)["text_features"]
    model.zero_grad()
    (features * images[:, None]).sum().backward()
    return [alone, features.detach()], [p.grad for p in model.text.parameters() if p.grad is not None]


@pytest.mark.parametrize(("build", "most"), [(bert, 0), (clip, 6)])
def test_captions_of_other_lengths_compile_nothing_and_change_nothing(build, most):
    """CLIP's towers compute one bucket after another, so with and without gradients there are three graphs of a layer:
    for the first bucket, for others, whose masks are aligned differently, and for a bucket of one caption."""
    model = build().train()
    compiled = deepcopy(model)
    compile_layers(compiled, backend="eager")
    numbers = []
    for step in range(5):
        (expected, gradients), (got, got_gradients) = run(model, step), run(compiled, step)
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        torch.testing.assert_close(got_gradients, gradients, rtol=0, atol=1e-5 * largest)
        numbers.append(counters["stats"]["unique_graphs"])
    assert 0 < numbers[-1] <= (most or numbers[0]), numbers
    assert compiled.state_dict().keys() == model.state_dict().keys()


def train_two_steps(rank: int, port: int) -> None:
    """Trains with two micro-batches a step and recomputed activations, eager and compiled, and compares the weights."""
    set_rank(rank, 2, port)
    dist.init_process_group("gloo")
    weights = []
    for is_compiled in (False, True):
        core = bert().train()
        core.visual.requires_grad_(False)
        core.text.set_grad_checkpointing()
        if is_compiled:
            compile_layers(core, backend="eager")
        whole = torch.nn.parallel.DistributedDataParallel(TrainModel(core), broadcast_buffers=False)
        step = Stepper(whole, core, LongCaptionLoss(), torch.optim.SGD(core.parameters(), lr=0.1))
        for number in range(2):
            images = torch.randn(2, 2, core.visual.output_dim, generator=torch.Generator().manual_seed(number + rank))
            packed = (captions_of_step(core, 2 * number + rank), captions_of_step(core, 2 * number + 4 + rank))
            step([{"image_features": rows, "packed_text": captions} for rows, captions in zip(images, packed)])
        weights.append([parameter.detach() for parameter in core.parameters()])
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(*weights, rtol=0, atol=5e-6)
    dist.destroy_process_group()


def test_two_processes_and_accumulation_train_compiled_layers_as_eager_ones():
    assert end_ranks(start_ranks(train_two_steps, 2, free_ports(1)[0])) == [0, 0]
