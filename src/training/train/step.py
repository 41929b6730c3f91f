"""One optimizer step: forward, loss, backward, clip, update; with gradient accumulation over micro-batches.

To change a part, subclass `Stepper` and create an instance of your class in `run.make_stepper`; see CONTRIBUTING.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import record_function

from training.model.towers.corner import cosine_with_cls

LOGIT_SCALE_MAX = math.log(100)
IMAGE_INPUTS = ("image", "image_features")
SCALARS = ("logit_scale", "logit_bias")  # of any shape


@dataclass
class Stepper:
    """Computes optimizer steps.

    Attributes:
        model: a `TrainModel`, possibly compiled or wrapped in DDP; called with a batch's inputs by name.
        core: the two-tower model inside it.
        loss: called with the model's output and ``output_dict=True``.
        optimizer: optimizer of `core`'s parameters.
        autocast: returns the context of forward passes.
        scaler: gradient scaler for float16; None otherwise.
        max_norm: maximum norm of the gradient; None does not clip.
        on_any_rank: flag on the device -> whether it is set on any rank.
        locked_images: for an image tower that is not trained: ``image`` or ``image_features`` -> normalised features.
            It runs once per image, separately from `model`; the features are gathered while the text tower computes.
            None if images go through `model`.
        corners: indices of [CLS] and the corners among the text features, see `corner.corner_places`.
    """

    model: nn.Module
    core: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: Callable = nullcontext
    scaler: torch.amp.GradScaler | None = None
    max_norm: float | None = None
    on_any_rank: Callable[[torch.Tensor], torch.Tensor] = lambda flag: flag
    locked_images: Callable[..., torch.Tensor] | None = None
    corners: tuple[list[int], list[int]] = ((), ())

    def __call__(self, micro_batches: Sequence[dict[str, object]]) -> dict[str, torch.Tensor]:
        """Takes a step on micro-batches as if on one batch; does not update if loss or gradient is not finite.

        Args:
            micro_batches: inputs of the model by name (see `data.batch`), on its device.

        Returns:
            Loss terms, ``loss``, ``grad_norm``, ``logit_scale``, ``corner_cls_cosine`` if there are corners, and
            ``skipped_steps`` (1: loss or gradient not finite on some rank), as tensors on the device: reading them
            synchronises.
        """
        self.optimizer.zero_grad(set_to_none=True)
        batches, early = self.encode_locked_images(micro_batches)
        if len(batches) == 1:
            terms, extra = self._backward(self.forward(batches[0]), early)
        else:
            terms, extra = self._accumulate(batches, early)
        total = sum(value.detach() for value in terms.values())
        grad_norm, skipped = self.update(total)
        with torch.no_grad():
            self.core.logit_scale.clamp_(0, LOGIT_SCALE_MAX)
        report = {name: value.detach() for name, value in terms.items()} | {"grad_norm": grad_norm}
        scale = self.core.logit_scale.detach().exp().reshape(())
        return {"loss": total, **report, "logit_scale": scale, **extra, "skipped_steps": skipped}

    @record_function("forward")
    def forward(self, batch: dict[str, object]) -> dict[str, torch.Tensor]:
        """Returns the model's output for a micro-batch: features and scalars, by the names of the loss's arguments."""
        with self.autocast():
            return self.model(**batch)

    @record_function("loss")
    def compute_loss(self, output: dict[str, torch.Tensor], early: dict[str, object]) -> dict[str, torch.Tensor]:
        """Returns the loss terms, whose sum is minimised.

        Args:
            output: result of `forward` in fp32, with the rows of all micro-batches.
            early: additional arguments of the loss, from `encode_locked_images`.
        """
        return self.loss(**output, **early, output_dict=True)

    def watch(self, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns additional metrics of an output to log, as detached scalars."""
        if not self.corners[0]:
            return {}
        return {"corner_cls_cosine": cosine_with_cls(output["text_features"], self.corners)}

    @record_function("update")
    def update(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips and applies the gradients, unless gradients or loss are not finite on some rank.

        Returns:
            The norm of the gradient before clipping, and whether the step was skipped (0 or 1).
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.max_norm:
            norm = nn.utils.clip_grad_norm_(parameters, self.max_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Gradients are the same on all ranks, but losses may differ.
        skipped = self.on_any_rank((~(norm.isfinite() & loss.isfinite())).float())
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            # Like GradScaler: the fused optimizer checks the flag on the device, so no step synchronises.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        return norm, skipped

    @torch.no_grad()
    def encode_locked_images(self, micro_batches: Sequence[dict[str, object]]) -> tuple[Sequence[dict], dict]:
        """Encodes the images of a locked tower and starts to gather the features.

        Returns:
            The micro-batches with features instead of images, and additional arguments of the loss. If images go
            through the model, the micro-batches are returned unchanged.
        """
        if self.locked_images is None:
            return micro_batches, {}
        images = [{name: batch[name] for name in IMAGE_INPUTS if name in batch} for batch in micro_batches]
        with self.autocast():
            features = [self.locked_images(**own).float() for own in images]
        rest = [{name: value for name, value in batch.items() if name not in IMAGE_INPUTS} for batch in micro_batches]
        batches = [{"image_features": own} | others for own, others in zip(features, rest)]
        return batches, {"early": self.loss.gather_early(torch.cat(features))}

    def _backward(self, output: dict[str, torch.Tensor], early: dict[str, object]) -> tuple[dict, dict]:
        """Returns the loss terms and the additional metrics."""
        output = {name: _in_fp32(value) for name, value in output.items()}
        terms = self.compute_loss(output, early)
        total = sum(terms.values())
        with record_function("backward"):
            (self.scaler.scale(total) if self.scaler else total).backward()
        return terms, self.watch(output)

    def _accumulate(self, micro_batches: Sequence[dict[str, object]], early: dict[str, object]) -> tuple[dict, dict]:
        """Accumulates gradients of a contrastive loss over micro-batches.

        First, the outputs of all micro-batches are computed without a graph. Then each micro-batch is computed again
        with a graph, with the same dropout, and compared with the stored rows of the other micro-batches. Each of these
        passes computes the whole loss, so only the last one adds to the gradients of the loss's own parameters, and a
        scalar output counts as the mean over the micro-batches.

        Raises:
            ValueError: an output is neither a scalar nor has one row per image, or the loss has the model's parameters.

        Source: GradCache (arXiv 2101.06983).
        """
        if set(self.loss.parameters()) & set(self.core.parameters()):
            raise ValueError("--accum-freq: the loss has parameters of the model; pass what they compute as an output")
        cached, states = [], []
        for batch in micro_batches:
            states.append(_random_state())
            with torch.no_grad():
                cached.append({name: _in_fp32(value) for name, value in self.forward(batch).items()})
        after = _random_state()
        for number, batch in enumerate(micro_batches):
            _set_random_state(states[number])
            is_last = number == len(micro_batches) - 1
            # DDP reduces gradients only once, in the last backward pass.
            with nullcontext() if is_last or not hasattr(self.model, "no_sync") else self.model.no_sync():
                own = self.forward(batch)
                num_rows = next(len(batch[name]) for name in IMAGE_INPUTS if name in batch)
                output = {
                    name: _join(name, value, [other[name] for other in cached], number, num_rows)
                    for name, value in own.items()
                }
                _set_random_state(after)  # a loss that draws random numbers draws the same ones in each pass
                with nullcontext() if is_last else _frozen(self.loss):
                    found = self._backward(output, early)
        return found


def _in_fp32(value: torch.Tensor) -> torch.Tensor:
    """Widens floating-point outputs: the loss is computed in fp32, as 16 bits make different captions nearly equal."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


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


def _join(name: str, value: torch.Tensor, cached: list[torch.Tensor], number: int, num_rows: int) -> torch.Tensor:
    """Returns an output of the whole batch, of which micro-batch `number` has a graph; raises like `is_row_wise`."""
    value = _in_fp32(value)
    if is_row_wise(name, value, num_rows):
        return torch.cat([*cached[:number], value, *cached[number + 1 :]])
    mean = cached[0] + sum(other - cached[0] for other in cached[1:]) / len(cached)  # exact if all are equal
    return mean + (value - value.detach()) / len(cached)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Context in which a module's parameters collect no gradients."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
