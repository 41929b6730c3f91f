"""The benchmarks run, compare both sides with each other and write their files; their measurements are not tested."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_corner import random_ids, tower
from test_loss import unit
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import data_mixing, gpu_check, published, text_step
from benchmarks.__main__ import FIGURES, main
from benchmarks.measure import Figure, Setting, check_close, largest_that_fits, peak_bytes, reference_captions
from training.loss.caption_loss import LongCaptionLoss
from training.model.towers.corner import prefix_attention


def test_the_gpu_check_runs_its_figures_as_processes(tmp_path, capsys, monkeypatch):
    """Two of them; `test_a_quick_run_writes_its_figures` runs all."""
    monkeypatch.setattr(gpu_check, "FIGURES", ("loss", "precision"))
    assert gpu_check.main(["--cpu", "--skip-tests", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {name: step["outcome"] for name, step in written["steps"].items()} == {"loss": "done", "precision": "done"}
    assert written["environment"]["torch"] == torch.__version__
    assert "batch 4,096" in written["figures"]["loss"]["title"]
    assert (tmp_path / "gpu-cpu.png").stat().st_size > 1000
    assert "target (H100)" in capsys.readouterr().out


def check_time_ratios(content: dict, names: tuple[str, ...]) -> None:
    """Checks that a ratio is the baseline's seconds over ours; the speed of a side is not tested."""
    for name in names:
        seconds = content[name]["seconds"]
        assert content[name]["time_ratio"] == pytest.approx(seconds["baseline"] / seconds["ours"]), name


def test_a_step_that_the_time_limit_cuts_short_is_recorded(tmp_path, capsys):
    assert gpu_check.main(["--cpu", "--skip-tests", "--out", str(tmp_path), "--limit-s", "0.01"]) == 1
    steps = json.loads((tmp_path / "gpu-cpu.json").read_text())["steps"]
    assert set(steps) == set(gpu_check.FIGURES)
    assert all(step["outcome"] == "cut short by the time limit" for step in steps.values())


def test_each_step_has_a_share_of_the_time_limit():
    assert sum(gpu_check.SHARES.values()) == pytest.approx(1) and min(gpu_check.SHARES.values()) > 0


def test_a_step_is_stopped_with_all_its_processes(tmp_path):
    """A child keeps the pipe open after its parent has ended, as a loader process may."""
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 600 & echo $! > {pid_file}"]
    assert gpu_check._run(command, time.monotonic() + 2)[0] is None
    child, patience = Path("/proc", pid_file.read_text().strip(), "stat"), time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < patience


def is_running(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_figure_that_does_not_fit_into_memory_is_made_smaller():
    def work(size: int) -> Figure:
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Figure("x", f"{size}", {})

    limit = 300
    assert largest_that_fits(work, 1024).title == "256" and largest_that_fits(work, 200).title == "200"
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(work, 4)


@pytest.mark.parametrize("num_corners", [0, 2])
def test_the_floating_point_operations_are_those_that_torch_counts(num_corners):
    text = tower(num_corners=num_corners, num_layers=3)
    with FlopCounterMode(display=False) as counter:
        text_step._products(text, 40, torch.float32, torch.device("cpu"))()
    assert text_step._linear_flops(text, 40) == counter.get_total_flops()


def test_a_quick_run_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "new" / "b.json"
    assert main(["--quick", "--json", str(path), "--device", "cpu", "--only", ",".join(FIGURES)]) == 0
    content = json.loads(path.read_text())
    assert set(FIGURES) | set(gpu_check.FIGURES) < set(content)
    ratios = ("text_step", "loss", "train_step", "train_step_3_long", "train_step_cached", "evaluation", "data_loading")
    check_time_ratios(content, ratios)
    assert content["precision"]["recall_at_1"]["fp32"] > 0.3  # far from chance, so agreement means something
    assert content["precision"]["largest_difference"] <= 0.04  # 5 of 128 captions
    for name in ("text_step", "text_step_3_long", "text_step_bf16"):
        seconds = content[name]["seconds"]
        assert content[name]["products_share"] == pytest.approx(seconds["products"] / seconds["ours"]), name
    # counts, which don't depend on the load of the machine
    assert content["loss_large"]["memory_ratio"] > 4 and content["loss"]["memory_ratio"] > 8
    assert content["text_step"]["memory_ratio"] > 1.5 and content["text_step_3_long"]["memory_ratio"] > 1.5
    assert content["text_step"]["token_ratio"] > 1.7 and content["text_step_3_long"]["token_ratio"] > 1.3
    assert content["text_step"]["padding_share"] < 0.05
    assert content["evaluation"]["images_encoded"]["ours"] < content["evaluation"]["images_encoded"]["baseline"]
    mixing = content["data_mixing"]
    assert mixing["shards_per_batch"] == dict.fromkeys(("ours", "ours_window_5000", "baseline"), 6)  # all there are
    assert mixing["memory_ratio"] == mixing["peak_bytes"]["baseline"] / mixing["peak_bytes"]["ours"]
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "tokens/image" in capsys.readouterr().out


def test_mixing_is_counted_over_whole_batches(monkeypatch):
    monkeypatch.setattr(data_mixing, "BATCH_SIZE", 3)
    order = [("a", 0), ("a", 1), ("b", 0), ("b", 3), ("b", 1), ("b", 2), ("a", 2), ("a", 3)]
    assert data_mixing.shards_per_batch(order) == 1.5
    assert data_mixing.neighbours_together(order) == 3 / 4  # a0 a1, b1 b2, b2 b3, but not b0 b1


@torch.no_grad()
def test_the_baseline_is_the_published_scheme():
    text = tower(num_layers=2)
    ids = random_ids(text)
    keep = ids != text.pad_id
    assert torch.equal(published.attention_by_sample(ids, text.pad_id, 2), prefix_attention(keep, 2))
    several = ids.unflatten(0, (2, 2))
    torch.testing.assert_close(published.text_features(text, several), text(several), rtol=0, atol=1e-5)
    images, texts, scale = unit(6, 8, seed=0), unit(6, 4, 8, seed=1), torch.tensor(9.0, dtype=torch.float64)
    torch.testing.assert_close(published.loss(images, texts, scale), LongCaptionLoss()(images, texts, scale))


def test_captions_have_the_published_lengths():
    short, long = reference_captions(2000, 2)
    short, long = ((ids != 0).sum(-1).double() for ids in (short, long))
    assert abs(float(short.mean()) - 18) < 0.5 and abs(float(long.mean()) - 110) < 2 and float(long.max()) == 128


def test_peak_memory_counts_simultaneous_allocations(tmp_path):
    def work():
        for _ in range(3):
            a = torch.ones(1_000_000)
            b = a + 1
            del a, b

    peak = peak_bytes(work, Setting(torch.device("cpu"), True, tmp_path))
    assert 8_000_000 <= peak < 8_100_000


def test_sides_that_differ_are_an_error(monkeypatch, tmp_path, capsys):
    check_close("x", torch.ones(2), torch.ones(2) * 1.00001, 1e-4)
    monkeypatch.setattr(published, "loss", lambda images, texts, scale: 2 * LongCaptionLoss()(images, texts, scale))
    assert main(["--quick", "--only", "loss", "--json", str(tmp_path / "b.json"), "--device", "cpu"]) == 1
    assert "loss, value: ours and the baseline differ" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "loss,speed"], "no figure is called speed; there are text_step, stock_text, loss"),
        (["--json", "x.png"], "the plot gets the same name with .png"),
        (["--device", "warp"], "--device warp: not usable here"),
    ],
)
def test_usage_errors(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--quick", *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = "import benchmarks.__main__, sys; print([m for m in ('torch', 'training') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
