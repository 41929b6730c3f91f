"""Code that differs on a GPU: collectives, attention, the fp16 scaler, copies to the device, 16-bit evaluation.

Each test also runs on the CPU, so that its code is tested on machines without a GPU. ``pytest -m gpu`` selects the
variants for the GPU, ``pytest tests/test_gpu.py -k cpu`` those for the CPU.
"""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_packing import batch, gradients
from test_safety import command, steps  # noqa: F401, the second is a fixture
from test_step import Towers, batches

from benchmarks import precision
from benchmarks.measure import Setting
from support import SMALL_LOTLIP, evaluate, read_results
from training.data.images import normalise_pixels
from training.data.loader import TrainBatch, to_device
from training.flags.parser import parse_args
from training.loss.caption_loss import LongCaptionLoss, _Gather
from training.main import main
from training.model.assembly.factory import create_model
from training.model.assembly.from_flags import build_from_flags, make_arranger
from training.model.packing import CaptionArranger
from training.model.towers.encoders import text_encoder
from training.runtime.distributed import DistEnv
from training.train.build import make_stepper
from training.train.optim import make_optimizer, parameter_groups
from training.train.step import Stepper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def group_of_one(device, tmp_path):
    """Makes a process group of this process alone, with gloo on the CPU and NCCL on a GPU."""
    options = {"device_id": torch.device("cuda", 0)} if device.type == "cuda" else {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


def test_the_gather_of_features_on_one_process_changes_nothing(device, group_of_one):
    rows = torch.randn(5, 3, device=device, requires_grad=True)
    weights = torch.randn(5, 3, device=device)
    everyone = _Gather.apply(rows, 1, None)
    (everyone * weights).sum().backward()
    torch.testing.assert_close(everyone, rows, rtol=0, atol=0)
    torch.testing.assert_close(rows.grad, weights, rtol=0, atol=0)


def test_pixels_are_normalised_to_the_towers_dtype_and_layout(device):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    expected = (pixels.double() / 255 - mean.double()) / std.double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        got = normalise_pixels(
            pixels.to(device), mean.to(device), std.to(device), dtype, memory_format=torch.channels_last
        )
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=tolerance)


def test_captions_in_buckets_have_the_padded_features_and_gradients(device):
    torch.manual_seed(0)
    text = create_model("lotlip_tiny", pretrained_text=False).text.eval()
    captions = batch(text, num=15)
    text = text.to(device)
    short, long = (ids.to(device) for ids in captions)
    padded = torch.cat([text.all_features(short), text.all_features(long.flatten(0, 1))])
    expected = gradients(text, padded)
    features = text_encoder(text).packed_features(make_arranger(text, "buckets", device)(*captions).to(device))
    tolerance = 2e-2 if device.type == "cuda" else 1e-5  # fp32 products on a GPU may use TF32
    got = gradients(text, features)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(features, padded, rtol=0, atol=tolerance * float(padded.detach().abs().max()))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * largest, msg=name)


def test_the_fp16_scaler_trains_as_fp32_does_and_skips_an_overflow(device):
    start = Towers().float().eval().to(device)
    inputs = {name: value.float().to(device) for name, value in batches(1)[0].items()}
    steppers = {}
    for name in ("fp32", "fp16"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {}
        if name == "fp16":
            scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
            options = {"autocast": partial(torch.autocast, device.type, torch.float16), "scaler": scaler}
        steppers[name] = Stepper(model, model, LongCaptionLoss(), optimizer, **options)
    for stepper in steppers.values():
        assert not stepper([inputs])["skipped_steps"]
    before = copy.deepcopy(steppers["fp16"].core.state_dict())
    for name, value in steppers["fp32"].core.state_dict().items():
        assert not torch.equal(value, start.state_dict()[name])
        torch.testing.assert_close(before[name], value, rtol=0, atol=2e-3)
    overflow = inputs | {"image": inputs["image"] * 1e6}  # beyond fp16's 65,504
    assert steppers["fp16"]([overflow])["skipped_steps"]
    for name, value in steppers["fp16"].core.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert scaler.get_scale() == 2.0**9


def test_copies_to_the_device_are_whole_and_in_order(device):
    """Copies batches while the device computes; a copy that is read too early or overwritten gives wrong values."""
    text, stream = create_model("lotlip_tiny", pretrained_text=False).text, torch.Generator().manual_seed(0)
    arrange = CaptionArranger(text.pad_id)
    sent = []
    for number in range(6):
        image = torch.randint(256, (8, 3, 224, 224), generator=stream, dtype=torch.uint8)
        inputs = {"image": image.pin_memory() if device.type == "cuda" else image}
        sent.append(TrainBatch(inputs | {"packed_text": arrange(*batch(text))}, 0, 0, [f"{number}"], [], (0, number)))
    sums = []
    for want, (got, inputs) in zip(sent, to_device(iter(sent), device), strict=True):
        assert got is want and inputs["image"].device.type == device.type
        assert inputs["packed_text"].num_padded == want.inputs["packed_text"].num_padded
        work = torch.randn(1024, 1024, device=device)
        for _ in range(3):
            work = work @ work / 1024
        sums.append(inputs["image"].long().sum())
    assert [int(s) for s in sums] == [int(b.inputs["image"].long().sum()) for b in sent]


def test_16_bit_evaluation_finds_nearly_the_captions_that_fp32_finds(device):
    """Uses 128 captions and an untrained tower, whose margins are smaller than those of a trained tower."""
    facts = precision.run(Setting(device, True, Path()))[0].facts
    assert set(facts["recall_at_1"]) == {"fp32", "bf16"} | ({"fp16"} if device.type == "cuda" else set())
    assert facts["recall_at_1"]["fp32"] > 0.5
    assert facts["largest_difference"] <= 0.04


@pytest.mark.parametrize("flags", ["--text-packing padded", "--label-smoothing 0.1 --lock-image", "--siglip"])
def test_a_step_does_not_wait_for_the_device(device, flags):
    """On a GPU, torch raises an error where the host would read a value; test_meta_step.py has more settings."""
    args = parse_args(["--train-data", "d.tar", "--model", "lotlip_tiny", "--no-pretrained-text", *flags.split()])
    parts = build_from_flags(args, device)
    groups = parameter_groups(parts.model, 1e-3, 0.1, None, None)
    optimizer = make_optimizer(groups, "adamw", 1e-3, (0.9, 0.98), 1e-6)
    stepper = make_stepper(args, parts.model, optimizer, None, DistEnv(0, 1, device))
    stepper.model.train()
    short, long = batch(parts.model.text)
    captions = {"packed_text": parts.arrange(short, long)} if parts.arrange else {"text": short, "long_text": long}
    images = torch.zeros(len(short), 3, 64, 64, dtype=torch.uint8)
    inputs = {name: value.to(device) for name, value in {"image": images, **captions}.items()}
    stepper([inputs])  # libraries are initialised in the first step
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        report = stepper([inputs])
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not report["skipped_steps"] and report["loss"].isfinite()


def test_a_deterministic_run_that_is_resumed_equals_an_uninterrupted_one(device, scenes, tmp_path, steps):  # noqa: F811
    flags = ["--deterministic", "--device", str(device), "--workers", "1"]
    assert main(command(scenes, tmp_path, "whole", *flags)) == 0
    steps["stop"] = 13
    assert main(command(scenes, tmp_path, "run", *flags)) == 75
    steps.clear()
    assert main(command(scenes, tmp_path, "run", *flags, "--resume", "latest")) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    whole, run = (torch.load(tmp_path / n / "checkpoints/epoch_2.pt", weights_only=True) for n in ("whole", "run"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, run["state_dict"][name]), name
    for number, entries in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, run["optimizer"]["state"][number][name]) for name, value in entries.items())


def test_determinism_is_refused_where_it_can_not_be_had(scenes, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command(scenes, tmp_path, "run", "--deterministic", "--torchcompile"))
    assert "--deterministic: no effect with --torchcompile" in capsys.readouterr().err
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert main(command(scenes, tmp_path, "run", "--deterministic", "--device", "cpu")) == 2
    assert "--deterministic: CUBLAS_WORKSPACE_CONFIG=:0:0; unset it" in capsys.readouterr().err


def test_one_model_has_one_result_in_training_and_in_a_separate_evaluation(device, scenes, tmp_path):
    """Training's towers use TF32 on a GPU; evaluations do not."""
    flags = ["--urban1k-retrieval", str(scenes / "urban1k"), "--device", str(device)]
    assert main(command(scenes, tmp_path, "run", *flags, "--epochs", "1")) == 0
    inside = read_results(tmp_path, "run")
    weights = str(tmp_path / "run" / "checkpoints" / "epoch_1.pt")
    again = [*flags[:2], "--pretrained", weights, "--device", str(device)]
    apart = evaluate(tmp_path, SMALL_LOTLIP[1], *again, name="apart")
    found = [{k: v for k, v in r.items() if k.startswith("urban1k")} for r in (inside, apart)]
    assert found[0] and found[0] == found[1]
