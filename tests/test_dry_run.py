"""--dry-run of a training: its numbers against a real step and plain arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.measure import Setting, peak_bytes
from training.data.loader import collate_captions
from training.data.open import open_train_data
from training.flags.parser import parse_args
from training.main import main
from training.model.assembly.from_flags import build_from_flags
from training.runtime.distributed import DistEnv
from training.train.build import make_stepper
from training.train.dry_run import first_samples, trace
from training.train.optim import make_optimizer, parameter_groups
from training.train.run import open_sources

CPU = DistEnv(0, 1, torch.device("cpu"))


def flags(scenes, *more: str) -> list[str]:
    base = ["--train-data", str(scenes / "train"), "--model", "lotlip_tiny", "--no-pretrained-text", "--workers", "2"]
    return [*base, "--batch-size", "16", "--epochs", "3", *more]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--precision amp_bf16",
        "--lock-image --text-packing padded",
        "--accum-freq 2 --siglip",
        "--grad-checkpointing",
    ],
)
def test_peak_memory_is_that_of_a_real_step(scenes, more):
    """The real step is measured by torch's profiler, in addition to weights and optimizer."""
    args = parse_args(flags(scenes, *more.split()))
    source, _ = open_sources(args, CPU)
    parts = build_from_flags(args, CPU.device)
    data = open_train_data(args, parts.train_transform, parts.tokenizer, source, parts.arrange)
    rows, _ = first_samples(data)
    captions = collate_captions(data.reader, rows[:16])[0]
    if args.grad_checkpointing:
        parts.model.set_grad_checkpointing()
    optimizer = make_optimizer(parameter_groups(parts.model, 1e-3, 0.1, None, None), "adamw", 1e-3, (0.9, 0.98), 1e-6)
    stepper = make_stepper(args, parts.model, optimizer, None, CPU)
    stepper.model.train()
    images = torch.stack([row.inputs["image"] for row in rows[:16]])
    inputs = [{"image": images, **captions}] * args.accum_freq
    stepper(inputs)
    optimizer.zero_grad()
    state = [x for own in optimizer.state.values() for x in own.values()]
    held = sum(x.nbytes for x in [*parts.model.parameters(), *parts.model.buffers(), *state, images])
    real = held + peak_bytes(lambda: stepper(inputs), Setting(CPU.device, True, Path()))
    with torch.device("meta"):
        core = build_from_flags(args, torch.device("meta")).model
    ledger = trace(args, core, rows[0], captions, CPU)
    assert ledger.peak.total() == pytest.approx(real, rel=0.15)
    assert ledger.peak["optimizer"] == pytest.approx(sum(x.nbytes for x in state))


def test_the_plan_of_two_processes(scenes, tmp_path, capsys):
    path = tmp_path / "plan.json"
    more = [
        "--dry-run",
        "--precision",
        "fp32",
        "--dry-run-ranks",
        "2",
        "--dry-run-gpu",
        "A100",
        "--dry-run-json",
        str(path),
    ]
    assert main([*flags(scenes, *more), "--text-views", "raw,long*3", "--logs", str(tmp_path / "logs")]) == 0
    plan, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert not (tmp_path / "logs").exists()
    assert "| bottleneck" in shown and "2 x A100" in shown and "assumed: 40% of the GPU's peak" in shown
    assert plan["steps"] == 3 * (40 // 32) and plan["images_per_step"] == 32
    # One image feature, one of the raw caption, and [CLS] and two corners of each long one, of two processes, in fp32.
    dim = build_from_flags(parse_args(flags(scenes)), CPU.device).model.visual.output_dim
    features = 4 * 32 * (1 + 1 + 3 * 3) * dim
    assert plan["collective_bytes"]["allgather"] == features == plan["collective_bytes"]["reduce_scatter"]
    assert plan["collective_bytes"]["allreduce"] == 4 * plan["trained_parameters"]
    assert plan["memory_at_peak_bytes"]["gradients"] == 4 * plan["trained_parameters"]
    assert plan["most_of_a_kind_bytes"]["gathered features"] == features
    assert plan["checkpoint_bytes"] == pytest.approx(12 * plan["trained_parameters"], rel=0.01)
    assert (
        plan["peak_bytes"] == sum(plan["memory_at_peak_bytes"].values()) and plan["fits"] and plan["gpu_bytes"] == 80e9
    )
    files = [p.stat().st_size for p in (scenes / "train").rglob("*.tar")]
    assert not files or plan["sample_bytes"] == pytest.approx(sum(files) / 40, rel=0.5)
    seconds = plan["step_flops"] / 0.4 / (312e12 / 2)  # fp32 is computed in TF32
    assert plan["images_per_second"] == pytest.approx(32 / seconds)
    assert plan["bottleneck"] == "loading" and plan["step_seconds"]["loading"] == max(plan["step_seconds"].values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dry-run-gpu", "H1000"], "invalid choice: 'H1000' (choose from"),
        (["--dry-run-ranks", "512"], "a step takes 8,192 samples, but an epoch has 40"),
        (["--extract-image-features", "out"], "--dry-run: no effect with --extract-image-features"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would_refuse(scenes, tmp_path, more, said, capsys):
    try:
        code = main([*flags(scenes, "--dry-run", *more), "--logs", str(tmp_path / "logs")])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().err
    assert code == 2 and said in shown
    assert "H1000" not in shown or all(name in shown for name in ("H100", "A100", "RTX 4090"))
