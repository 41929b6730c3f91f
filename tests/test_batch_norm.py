"""Batch norms in a run with several processes: all ranks have the same statistics, those of all samples."""

import json

import pytest
import torch
from test_safety import command

from support import end_ranks, free_ports, set_rank, speak_to_files, start_ranks

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def train_rank(rank: int, argv: list[str], port: int, folder: str) -> None:
    """Trains; writes the statistics of this rank's model at the end, and the batch statistics of the first norm."""
    from training.main import main
    from training.train import run

    speak_to_files(rank, folder)
    set_rank(rank, 2, port)
    make, found, batches = run.make_stepper, [], []

    def make_stepper(*args: object) -> object:
        stepper = make(*args)
        found.append(stepper)

        def record(_: object, inputs: tuple[torch.Tensor]) -> None:
            if stepper.core.visual.training:
                batches.append(inputs[0].detach().double().var((0, 2, 3)).float())

        stepper.core.visual.bn1.register_forward_pre_hook(record)
        return stepper

    run.make_stepper = make_stepper
    assert main(argv) == 0
    state = {name: value.clone() for name, value in found[0].core.state_dict().items() if "running" in name}
    torch.save({"state": state, "variances": torch.stack(batches)}, f"{folder}/{rank}.pt")


def test_all_ranks_and_the_checkpoint_have_the_statistics_of_all_samples(scenes, tmp_path):
    config = tmp_path / "tiny_resnet.json"
    config.write_text(json.dumps(CONFIG))
    flags = ["--model", f"config:{config}", "--epochs", "1", "--batch-size", "5", "--device", "cpu"]
    argv = command(scenes, tmp_path, "run", *flags)
    assert end_ranks(start_ranks(train_rank, 2, argv, free_ports(1)[0], str(tmp_path))) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    assert len(ranks[0]["state"]) > 10
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]) and torch.equal(value, saved[name]), name
    expected = torch.ones(len(saved["visual.bn1.running_var"]))
    for variances in zip(*(rank["variances"] for rank in ranks)):
        assert not torch.equal(*variances)  # the ranks saw other samples
        expected = 0.9 * expected + 0.1 * sum(variances) / 2
    assert saved["visual.bn1.running_var"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
