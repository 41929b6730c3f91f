"""``--dry-run``: what a training needs and what limits it, from one step traced without memory and other processes.

The model is built on the meta device. Its step then runs on fake tensors of the CPU, which have shapes but no memory,
in a fake process group: all operations of rank 0 happen, and each is counted, but nothing is computed or sent.

Source: torchtitan's ``fake_backend`` mode.
"""

import argparse
import json
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from training.data.loader import collate_captions
from training.data.open import TrainData, open_train_data
from training.data.reader import Sample
from training.loss.blockwise import BLOCK_NUMBERS_GPU
from training.model.assembly.from_flags import build_from_flags
from training.readers.faults import BadSample
from training.readers.samples import RawSample
from training.runtime.distributed import DistEnv, failing_with
from training.runtime.experiment import Experiment, experiment_of
from training.runtime.gpus import GPUS
from training.runtime.messages import first_line
from training.train.build import make_loss, make_stepper, num_corners
from training.train.optim import optimizer_from_flags
from training.train.run import check_inputs, count_steps, open_sources
from training.train.step import Stepper

UTILISATION, BYTES_PER_S, NUM_SAMPLES = 0.4, 50e9, 64
ASSUMED = (
    f"assumed: {UTILISATION:.0%} of the GPU's peak; {BYTES_PER_S / 1e9:.0f} GB/s between GPUs, not hidden behind "
    "computation; a GPU's kernels keep what the CPU's keep; memory that the allocator loses, CUDA's context and NCCL's "
    f"buffers are not counted. Bytes and decoding rate: the first {NUM_SAMPLES} samples on one core of this machine"
)
GRADIENTS, GATHERED = "gradients", "gathered features"


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors by kind, FLOPs, and the bytes of collectives, of all operations in its context.

    Attributes:
        kind: kind of tensors made from now on.
        live, peak: kind -> bytes, now and when their sum was largest.
        most: kind -> its largest number of bytes, at whatever time.
        flops: FLOPs so far.
        sent: collective -> bytes of its largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.flops = "activations", 0
        self.live, self.peak, self.most, self.sent = (Counter[str]() for _ in range(4))
        self.kinds: dict[int, tuple[str, int]] = {}

    def add(self, tensor: torch.Tensor, kind: str, again: bool = False) -> None:
        """Counts a tensor's storage until it is freed; `again` changes the kind of one that is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.kinds:
            weakref.finalize(storage, self._remove, key)
        elif again:
            before, num_bytes = self.kinds[key]
            self.live[before] -= num_bytes
        else:
            return
        self.kinds[key] = kind, storage.nbytes()
        self.live[kind] += storage.nbytes()
        self.most[kind] = max(self.most[kind], self.live[kind])
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _remove(self, key: int) -> None:
        kind, num_bytes = self.kinds.pop(key)
        self.live[kind] -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        if func.namespace == "c10d":
            largest = max((x for x in tree_iter(args) if isinstance(x, torch.Tensor)), key=lambda x: x.nbytes)
            name = func._overloadpacket.__name__.strip("_").replace("_base", "")
            self.sent[name] += largest.nbytes
            if "gather" in name:
                self.add(largest, GATHERED, again=True)
        else:
            for tensor in tensors:
                self.add(tensor, self.kind)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def dry_run(args: argparse.Namespace) -> int:
    """Prints what a training needs, as a table, and as JSON with ``--dry-run-json``.

    Returns:
        Exit code. 0: success, also if the training would not fit; 2: wrong flags or files.
    """
    found = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    env = DistEnv(0, args.dry_run_ranks or int(found), torch.device("cpu"))
    alone = DistEnv(0, 1, env.device)
    with failing_with(2, ValueError, OSError):
        experiment = experiment_of(args)
        check_inputs(args, torch.device("cuda"))
        source, _ = open_sources(args, alone)
        steps = count_steps(args, source, env) * args.epochs
        weightless = {"pretrained": None, "pretrained_image": None, "pretrained_text": False}
        with torch.device("meta"):
            parts = build_from_flags(argparse.Namespace(**vars(args) | weightless), torch.device("meta"))
        data = open_train_data(args, parts.train_transform, parts.tokenizer, source, parts.arrange, experiment)
        rows, facts = first_samples(data)
        captions = collate_captions(data.reader, (rows * args.batch_size)[: args.batch_size])[0]
        ledger = trace(args, parts.model, rows[0], captions, env, BLOCK_NUMBERS_GPU, experiment)
    report = describe(args, parts.model, ledger, steps, facts, env)
    if args.dry_run_json:
        Path(args.dry_run_json).write_text(json.dumps(report, indent=1) + "\n")
    lines = [(name.replace("_", " "), _shown(name, value)) for name, value in _flat(report)]
    print(tabulate(lines, tablefmt="github", disable_numparse=True) + f"\n\n{ASSUMED}")
    if args.experiment:
        print(f"not counted: weights of --experiment {args.experiment} that are not the model's")
    return 0


def first_samples(data: TrainData) -> tuple[list[Sample], dict[str, float]]:
    """Reads the first samples; returns them, and ``bytes`` and ``seconds`` of a sample on one core."""
    rows, num_bytes, start = [], 0, time.perf_counter()
    for raw in islice(data.source.read(0, 0, min(NUM_SAMPLES, data.source.num_samples)), NUM_SAMPLES):
        with suppress(BadSample):
            rows.append(data.reader(raw))
            num_bytes += _size(raw)
    if not rows:
        raise ValueError(f"--train-data: none of the first {NUM_SAMPLES} samples can be used")
    return rows, {"bytes": num_bytes / len(rows), "seconds": (time.perf_counter() - start) / len(rows)}


def _size(raw: RawSample) -> int:
    if raw.features is not None:
        return raw.features.nbytes
    return sum(map(len, raw.files.values())) or (os.path.getsize(raw.image_path) if raw.image_path else 0)


def trace(
    args: argparse.Namespace,
    core: Any,
    row: Sample,
    captions: dict[str, object],
    env: DistEnv,
    block_numbers: int | None = None,
    experiment: Experiment = Experiment(None),
) -> Ledger:
    """Traces the second step of rank 0; in the first one, the optimizer makes its state.

    Args:
        args: flags.
        core: the model, on the meta device; its tensors are replaced by fake ones.
        row: any sample, for the shape of images.
        captions: inputs of a micro-batch.
        env: rank 0 of the traced processes.
        block_numbers: of the loss of the flags, see `blockwise.block_size`.
        experiment: changes the step.
    """
    ledger = Ledger()
    with _fake_group(env), FakeTensorMode(allow_non_fake_inputs=True):
        stepper = _fake_stepper(args, core, env, block_numbers, experiment)
        trained = [p for p in core.parameters() if p.requires_grad]
        images = {n: torch.empty(args.batch_size, *v.shape, dtype=v.dtype) for n, v in row.inputs.items()}
        state = [x for x in tree_iter(dict(stepper.optimizer.state)) if isinstance(x, torch.Tensor)]
        weights = [*core.parameters(), *core.buffers()]
        for kind, tensors in (("weights", weights), ("optimizer", state), ("inputs", images.values())):
            for tensor in tensors:
                ledger.add(tensor, kind)
        kind_of_gradient = GRADIENTS
        if env.world_size > 1:  # gradients are views of DDP's buckets, which stay, and are summed over ranks
            kind_of_gradient = ""
            ledger.live[GRADIENTS] = ledger.most[GRADIENTS] = sum(p.nbytes for p in trained)
            ledger.sent["allreduce"] += ledger.live[GRADIENTS]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.add(p.grad, kind_of_gradient, again=True))
        with ledger:
            output, others = stepper.forward([images | captions] * args.accum_freq)
            ledger.kind = "loss"
            terms = stepper.compute_loss(output, others)
            ledger.kind = "backward pass"
            stepper.backward(terms)
            ledger.kind = "update"
            stepper.update(terms)
    return ledger


def _fake_stepper(
    args: argparse.Namespace, core: Any, env: DistEnv, block_numbers: int | None, experiment: Experiment
) -> Stepper:
    """Returns the stepper of rank 0, without DDP, on fake tensors; its optimizer has its state."""
    _make_fake(core)
    if args.grad_checkpointing:
        core.set_grad_checkpointing()
    optimizer = optimizer_from_flags(args, core)
    try:
        stepper = make_stepper(args, core, optimizer, None, DistEnv(0, 1, env.device), experiment)
    except RuntimeError as error:  # a model can't be moved to a device here
        reason = f"makes what can't be traced, such as a teacher ({first_line(error)}); omit it to plan the rest"
        raise ValueError(f"--dry-run: --experiment {args.experiment} {reason}") from error
    loss: Any = make_loss(args, num_corners(core), env)
    loss.block_numbers = block_numbers
    stepper.loss = experiment.make_loss(loss, core)
    stepper.model.train()
    for parameter in core.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    optimizer.defaults["fused"] = True  # `Stepper` asks other optimizers' callers to read a flag
    return stepper


@contextmanager
def _fake_group(env: DistEnv) -> Iterator[None]:
    """Context of a process group that sends nothing; of none for one process."""
    if env.world_size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=env.rank, world_size=env.world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _make_fake(module: nn.Module) -> None:
    """Replaces tensors of the meta device by fake ones of the CPU, on which autocast acts; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        both: list[dict[str, Any]] = [owner._parameters, owner._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    new = torch.empty_like(tensor, device="cpu")
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if name in owner._parameters else new
                tensors[name] = tensor if tensor is None else made[id(tensor)]


def describe(
    args: argparse.Namespace, core: nn.Module, ledger: Ledger, steps: int, facts: dict[str, float], env: DistEnv
) -> dict[str, object]:
    """Returns the report: bytes, FLOPs, seconds and rates as numbers in SI units."""
    weights = list(core.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    is_16_bit = "16" in args.precision or args.precision == "amp"
    gpu_bytes = GPUS[args.dry_run_gpu][1]
    images = args.batch_size * args.accum_freq
    peak_flops = GPUS[args.dry_run_gpu][0] * (1.0 if is_16_bit else 0.5)  # of TF32 in fp32
    step_s = {
        "computing": ledger.flops / UTILISATION / peak_flops,
        "loading": images * facts["seconds"] / max(1, args.workers),
        "sending": ledger.sent.total() / BYTES_PER_S,
    }
    rate = images * env.world_size / step_s["computing"]
    peak = {kind: ledger.peak[kind] for kind, most in ledger.most.items() if kind and most}
    return {
        "model": args.model,
        "processes": f"{env.world_size} x {args.dry_run_gpu}",
        "parameters": sum(p.numel() for p in weights),
        "trained_parameters": trained,
        "memory_at_peak_bytes": peak,
        "most_of_a_kind_bytes": {kind: ledger.most[kind] for kind in peak},
        "peak_bytes": sum(peak.values()),
        "gpu_bytes": gpu_bytes,
        "fits": sum(peak.values()) < gpu_bytes,
        "step_flops": ledger.flops,
        "step_seconds": step_s,
        "bottleneck": max(step_s, key=lambda kind: step_s[kind]),
        "steps": steps,
        "hours": steps * step_s["computing"] / 3600,
        "images_per_step": images * env.world_size,
        "images_per_second": rate,
        "data_bytes_per_second": rate * facts["bytes"],
        "sample_bytes": facts["bytes"],
        "decoding_cores": rate * facts["seconds"],
        "samples_per_second_and_core": 1 / facts["seconds"],
        "loader_processes": max(1, args.workers) * env.world_size,
        "checkpoint_bytes": ledger.live["weights"] + ledger.live["optimizer"],
        "collective_bytes": dict(ledger.sent),
    }


def _flat(report: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in report.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {key}", number) for key, number in value.items())
        else:
            yield name, value


def _shown(name: str, value: Any) -> str:
    if "bytes" in name:
        return f"{value / 1e9:,.3f} GB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "flops" in name:
        return f"{value / 1e12:,.2f} TFLOP"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
