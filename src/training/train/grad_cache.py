"""Separates the towers' graph from the loss's, which also accumulates gradients of a contrastive loss.

With several micro-batches, each is compared with all others, not only with itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from training.runtime.arithmetic import get_random_state, set_random_state

SCALARS = ("logit_scale", "logit_bias")  # of any shape


def is_row_wise(name: str, value: torch.Tensor, num_rows: int) -> bool:
    """Whether an output of the model for `num_rows` images has one row per image; if not, it is a scalar.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, torch.Tensor):
        if name in SCALARS or not value.ndim:
            return False
        if len(value) == num_rows:
            return True
    found = f"the shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"the type {type(value).__name__}"
    raise ValueError(
        f"output {name} of the model has {found}; expected a tensor with {num_rows} rows, one per image, or a scalar"
    )


def in_fp32(output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Widens the floating-point tensors of an output, because 16 bits make different captions nearly equal."""
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in output.items()
    }


class GradCache:
    """Encodes micro-batches as if they were one batch, with the graph of only one of them in memory at a time.

    First, all micro-batches are encoded, and only the last keeps its graph. The loss is computed once, on the joined
    output, and its gradients are then passed on to the graphs: `backward` encodes the other micro-batches again, with
    the same dropout.

    Args:
        encode: function from a micro-batch to the output of the model: tensors with one row per image, and scalars, of
            which the mean over the micro-batches is taken.
        micro_batches: all of the same size.
        without_sync: returns a context in which a backward pass does not reduce gradients over ranks.

    Attributes:
        output: the joined output in fp32; its tensors are leaves that collect the gradients of the loss.

    Raises:
        ValueError: an output has neither one row per image nor is a scalar.

    Source: GradCache (arXiv 2101.06983); there, every micro-batch is encoded twice.
    """

    def __init__(
        self,
        encode: Callable[[object], dict[str, torch.Tensor]],
        micro_batches: Sequence[object],
        without_sync: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.encode, self.without_sync = encode, without_sync
        *self.earlier, last = micro_batches
        outputs, self.random_states = [], []
        for batch in self.earlier:
            self.random_states.append(get_random_state())
            with torch.no_grad():
                outputs.append(in_fp32(encode(batch)))
        with without_sync() if self.earlier else nullcontext():
            self.last = in_fp32(encode(last))
        self.size = len(self.last["image_features"])
        self.output = {}
        for name, value in self.last.items():
            is_rows = is_row_wise(name, value, self.size)
            others = [output[name].detach() for output in outputs]
            if not others:
                joined = value.detach()
            elif is_rows:
                joined = torch.cat([*others, value.detach()])
            else:  # exact if all are equal
                joined = value.detach() + sum(other - value.detach() for other in others) / len(micro_batches)
            self.output[name] = joined.requires_grad_(value.requires_grad)

    def backward(self) -> None:
        """Passes the gradients of `output` on to the parameters."""
        after = get_random_state() if self.earlier else None
        with self.without_sync() if self.earlier else nullcontext():
            self._backward(len(self.earlier), self.last)
        self.last = None  # frees its graph
        for number, (batch, state) in enumerate(zip(self.earlier, self.random_states)):
            set_random_state(state)
            is_last = number == len(self.earlier) - 1
            with nullcontext() if is_last else self.without_sync():
                self._backward(number, in_fp32(self.encode(batch)))
        if after:
            set_random_state(after)

    def _backward(self, number: int, output: dict[str, torch.Tensor]) -> None:
        rows = slice(number * self.size, (number + 1) * self.size)
        tensors, gradients = [], []
        for name, joined in self.output.items():
            if joined.grad is not None:
                is_rows = is_row_wise(name, output[name], self.size)
                tensors.append(output[name])
                gradients.append(joined.grad[rows] if is_rows else joined.grad / (len(self.earlier) + 1))
        torch.autograd.backward(tensors, gradients)
