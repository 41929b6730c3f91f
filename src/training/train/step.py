"""One optimizer step: forward, loss, backward, update; with gradient accumulation over micro-batches.

To change a part, subclass `Stepper` and return your class from `Experiment.stepper_class`.
None of its methods may read a tensor on the host (``if tensor``, ``.item()``, boolean indexing), because on a GPU the
host would wait for all computations that it has started.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from training.data.reader import FIELD
from training.model.towers.corner import cosine_with_cls
from training.model.towers.locking import BATCH_NORMS
from training.runtime.arithmetic import get_random_state, set_random_state
from training.runtime.distributed import DistEnv, max_over_ranks

LOGIT_SCALE_MAX = math.log(100)
IMAGE_INPUTS = ("image", "image_features")
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

    Each is then compared with all others, not only with itself.
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
        encode: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        micro_batches: Sequence[dict[str, Any]],
        without_sync: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.encode, self.without_sync = encode, without_sync
        *self.earlier, last = micro_batches
        outputs: list[dict[str, torch.Tensor]] = []
        self.random_states: list[dict[str, torch.Tensor | None]] = []
        for batch in self.earlier:
            self.random_states.append(get_random_state())
            with torch.no_grad():
                outputs.append(in_fp32(encode(batch)))
        with without_sync() if self.earlier else nullcontext():
            self.last = in_fp32(encode(last))
        self.size = len(self.last["image_features"])
        self.output: dict[str, torch.Tensor] = {}
        for name, value in self.last.items():
            is_rows = is_row_wise(name, value, self.size)
            joined, others = value.detach(), [output[name].detach() for output in outputs]
            if others and is_rows:
                joined = torch.cat([*others, joined])
            elif others:  # exact if all are equal
                joined = joined + sum(other - joined for other in others) / len(micro_batches)
            self.output[name] = joined.requires_grad_(value.requires_grad)

    def backward(self) -> None:
        """Passes the gradients of `output` on to the parameters, first those of the last micro-batch."""
        after = get_random_state() if self.earlier else None
        for number in range(-1, len(self.earlier)):
            with nullcontext() if number == len(self.earlier) - 1 else self.without_sync():
                self._backward(number)
        if after:
            set_random_state(after)

    def _backward(self, number: int) -> None:
        if number < 0:
            output, self.last = self.last, {}  # so that its graph is freed at the end of this function
        else:
            set_random_state(self.random_states[number])
            output = in_fp32(self.encode(self.earlier[number]))
        num_batches = len(self.earlier) + 1
        start = number % num_batches * self.size
        tensors, gradients = [], []
        for name, joined in self.output.items():
            if joined.grad is not None:
                is_rows = is_row_wise(name, output[name], self.size)
                tensors.append(output[name])
                gradients.append(joined.grad[start : start + self.size] if is_rows else joined.grad / num_batches)
        torch.autograd.backward(tensors, gradients)


@dataclass
class Stepper:
    """The parts of an optimizer step, in the order in which the training loop calls them.

    Attributes:
        model: a `TrainModel`, possibly compiled or wrapped in DDP; called with a batch's inputs by name.
        core: the two-tower model inside it.
        loss: a module or function, called with the model's output and ``output_dict=True``.
        optimizer: optimizer of `core`'s parameters.
        autocast: returns the context of forward passes.
        arithmetic: returns the context of the towers' forward and backward passes; the loss is computed outside of it.
        scaler: gradient scaler for float16; None otherwise.
        max_norm: maximum norm of the gradient; None does not clip.
        locked_images: `TrainModel.encode_images` of an image tower that is not trained. It runs once per image,
            separately from `model`. None if images go through `model`.
        average: moving average of `core`, updated after each step; see `Experiment.make_average`.
        corners: indices of [CLS] and the corners among the text features, see `corner.corner_indices`.
        env: this process.
    """

    model: nn.Module
    core: Any
    loss: Callable
    optimizer: torch.optim.Optimizer
    autocast: Callable = nullcontext
    arithmetic: Callable = nullcontext
    scaler: torch.amp.GradScaler | None = None
    max_norm: float | None = None
    locked_images: Callable[..., dict[str, torch.Tensor]] | None = None
    corners: tuple[list[int], list[int]] | None = None
    average: Any = None
    env: DistEnv = DistEnv(0, 1, torch.device("cpu"))
    cache: GradCache = field(init=False)

    def __post_init__(self) -> None:
        self.norms = [m for m in self.core.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]

    def __call__(self, micro_batches: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Takes a whole step; the training loop calls the same parts one by one.

        Args:
            micro_batches: inputs of the model by name (see `data.batch`), on its device.

        Returns:
            See `report`.
        """
        output, others = self.forward(micro_batches)
        terms = self.compute_loss(output, others)
        self.backward(terms)
        return self.report(output, terms, *self.update(terms))

    @record_function("forward")
    def forward(self, micro_batches: Sequence[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """Computes the model's output for the micro-batches of a step, as if they were one batch.

        Returns:
            The output in fp32, by the names of the loss's arguments: 16-bit features would make different captions
            nearly equal. And additional arguments of the loss, from `encode_locked_images` and the experiment's fields.
        """
        inputs, others = [], []
        for batch in micro_batches:
            fields = {name.removeprefix(FIELD): value for name, value in batch.items() if name.startswith(FIELD)}
            of_model = {name: value for name, value in batch.items() if not name.startswith(FIELD)}
            of_model, of_images = self.encode_locked_images(of_model)
            inputs.append(of_model)
            others.append(of_images | fields)
        # DDP reduces gradients only once, in the last backward pass of a step.
        self.cache = GradCache(self.encode, inputs, getattr(self.model, "no_sync", nullcontext))
        return self.cache.output, {name: torch.cat([each[name] for each in others]) for name in others[0]}

    def encode(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the model's output for one micro-batch: features [batch, ...] and scalars."""
        with self.arithmetic(), self.autocast():
            return self.model(**batch)

    @record_function("loss")
    def compute_loss(self, output: dict[str, torch.Tensor], others: dict[str, object]) -> dict[str, torch.Tensor]:
        """Returns the loss terms, whose sum is minimised.

        Args:
            output, others: result of `forward`.
        """
        return self.loss(**output, **others, output_dict=True)

    @record_function("backward")
    def backward(self, terms: dict[str, torch.Tensor]) -> None:
        """Computes the gradients of the sum of the terms, for all parameters of model and loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = sum(terms.values())
        (self.scaler.scale(total) if self.scaler else total).backward()
        with self.arithmetic():
            self.cache.backward()
        for parameter in self.loss.parameters() if isinstance(self.loss, nn.Module) else ():  # DDP wraps the model only
            if parameter.grad is not None and dist.is_initialized():
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))

    @record_function("update")
    def update(
        self, terms: dict[str, torch.Tensor], requests: Sequence[bool] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and applies the gradients, unless gradients or loss are not finite on some rank.

        Args:
            terms: result of `compute_loss`.
            requests: what this rank asks of all ranks; travels with the flag that is reduced anyway.

        Returns:
            The norm of the gradient before clipping, and flags [1 + number of requests] that are the same on all ranks:
            whether the step was skipped (0 or 1), and whether any rank made each request.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.max_norm:
            norm = nn.utils.clip_grad_norm_(parameters, self.max_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Gradients are the same on all ranks, but losses may differ.
        total: Any = sum(value.detach() for value in terms.values())
        bad = ~(norm.isfinite() & total.isfinite())
        flags = torch.stack([bad.float(), *(bad.new_full((), made, dtype=torch.float32) for made in requests)])
        flags = max_over_ranks(flags, self.env)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            # Like GradScaler: the fused optimizer checks the flag on the device, so no step synchronises.
            vars(self.optimizer).update(grad_scale=None, found_inf=flags[0])
            self.optimizer.step()
        elif not flags[0]:
            self.optimizer.step()
        with torch.no_grad():
            self.core.logit_scale.clamp_(0, LOGIT_SCALE_MAX)
        self.average_statistics()
        if self.average is not None:
            self.average.update(self.core)
        return norm, flags

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the model has its averaged weights, if there are any."""
        weights = copy.deepcopy(self.core.state_dict()) if self.average is not None else {}
        if weights:
            self.core.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            if weights:
                self.core.load_state_dict(weights)

    def report(
        self, output: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], norm: torch.Tensor, flags: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what a step logs, as scalars on the device: reading them synchronises.

        Returns:
            ``loss``, the loss terms, ``grad_norm``, ``logit_scale``, the entries of `watch`, and ``skipped_steps``
            (1: loss or gradient not finite on some rank).
        """
        detached = {name: value.detach() for name, value in terms.items()}
        total: Any = sum(detached.values())
        scale = self.core.logit_scale.detach().exp().reshape(())
        norms = {"grad_norm": norm, "logit_scale": scale}
        return {"loss": total, **detached, **norms, **self.watch(output), "skipped_steps": flags[0]}

    def watch(self, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns additional metrics of an output to log, as detached scalars."""
        if not self.corners or not self.corners[0]:
            return {}
        return {"corner_cls_cosine": cosine_with_cls(output["text_features"], self.corners)}

    @torch.no_grad()
    def encode_locked_images(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Encodes the images of a micro-batch by a locked tower.

        Returns:
            The micro-batch with features instead of images, and the tower's other outputs, for the loss. If images go
            through the model, the micro-batch is returned unchanged.
        """
        if self.locked_images is None:
            return batch, {}
        with self.arithmetic(), self.autocast():
            others = in_fp32(self.locked_images(**{name: batch[name] for name in IMAGE_INPUTS if name in batch}))
        rest = {name: value for name, value in batch.items() if name not in IMAGE_INPUTS}
        return {"image_features": others.pop("image_features"), **rest}, others

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Averages the statistics of batch norms over ranks, in place.

        All ranks then evaluate the same model, which is the one that is saved, and a resumed run continues with the
        same statistics. A mean is that of all ranks' batches; a variance is the mean of the variances within these
        batches. Training itself does not read them. Source: timm's ``distribute_bn`` with ``reduce``, at each step.
        """
        moving: list[Any] = [norm for norm in self.norms if norm.training]  # frozen ones are in eval mode
        buffers = [buffer for norm in moving for buffer in (norm.running_mean, norm.running_var)]
        if buffers and self.env.world_size > 1:
            sums = torch.cat([buffer.float() for buffer in buffers])
            dist.all_reduce(sums)
            for buffer, summed in zip(buffers, sums.split([len(buffer) for buffer in buffers])):
                buffer.copy_(summed / self.env.world_size)
