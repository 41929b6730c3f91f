"""Separates the towers' graph from the loss's, which also accumulates gradients of a contrastive loss.

With several micro-batches, each is compared with all others, not only with itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

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
        self.encode, self.micro_batches, self.without_sync = encode, micro_batches, without_sync
        outputs, self.random_states = [], []
        for batch in micro_batches[:-1]:
            self.random_states.append(_random_state())
            with torch.no_grad():
                outputs.append(in_fp32(encode(batch)))
        with without_sync() if outputs else nullcontext():
            self.last = in_fp32(encode(micro_batches[-1]))
        self.size = len(self.last["image_features"])
        self.output = dict(self.last)
        for name, value in self.last.items():
            if not outputs:
                if isinstance(value, torch.Tensor):
                    self.output[name] = value.detach().requires_grad_(value.requires_grad)
                continue
            values = [*(output[name] for output in outputs), value]
            if is_row_wise(name, value, self.size):
                joined = torch.cat([part.detach() for part in values])
            else:  # exact if all are equal
                joined = value.detach() + sum(other.detach() - value.detach() for other in values) / len(values)
            self.output[name] = joined.requires_grad_(value.requires_grad)

    def backward(self) -> None:
        """Passes the gradients of `output` on to the parameters."""
        if not self.random_states:
            return self._backward(0, self.last)
        after = _random_state()
        with self.without_sync():
            self._backward(len(self.random_states), self.last)
        self.last = None  # frees its graph
        for number, (batch, state) in enumerate(zip(self.micro_batches, self.random_states)):
            _set_random_state(state)
            is_last = number == len(self.random_states) - 1
            with nullcontext() if is_last else self.without_sync():
                self._backward(number, in_fp32(self.encode(batch)))
        _set_random_state(after)

    def _backward(self, number: int, output: dict[str, torch.Tensor]) -> None:
        rows = slice(number * self.size, (number + 1) * self.size)
        tensors, gradients = [], []
        for name, value in output.items():
            gradient = getattr(self.output[name], "grad", None)
            if gradient is not None:
                tensors.append(value)
                if len(self.micro_batches) > 1:
                    is_rows = is_row_wise(name, value, self.size)
                    gradient = gradient[rows] if is_rows else gradient / len(self.micro_batches)
                gradients.append(gradient)
        torch.autograd.backward(tensors, gradients)


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
