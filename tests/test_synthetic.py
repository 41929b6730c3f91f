"""--train-data synthetic: samples that are made on the spot."""

import json

import pytest
import torch

from support import SMALL_LOTLIP
from training import get_tokenizer
from training.data.synthetic import SyntheticSource
from training.main import main

RUN = [*SMALL_LOTLIP, *"--device cpu --batch-size 5 --train-num-samples 20 --log-every-n-steps 1".split()]


@pytest.mark.parametrize("model", ["ViT-B-32", "lotlip_tiny"])
@pytest.mark.parametrize("tokens", [4, 5, 13, 14, 77, 300])
def test_captions_have_the_chosen_number_of_tokens(tokens, model):
    source = SyntheticSource(f"synthetic:{tokens}", None, 0, (["raw"], ["long"]))
    records = [sample.record for sample in source.read(0, 0, 5)]
    tokenizer = get_tokenizer(model, num_corner_tokens=0, context_length=400)
    for key, expected in (("long", tokens), ("raw", 18)):
        assert (tokenizer([record[key] for record in records]) != 0).sum(1).tolist() == [expected] * 5
    assert len({record["long"] for record in records}) == 5 or tokens < 13
    assert records != [sample.record for sample in source.read(1, 0, 5)]


def test_it_is_trained_on_and_resumed_bit_for_bit(tmp_path):
    flags = ["--train-data", "synthetic:40", "--lr-scheduler", "const", "--logs", str(tmp_path), "--workers", "1"]
    for name, epochs in (("whole", "2"), ("run", "1"), ("run", "2")):
        assert main([*RUN, *flags, "--name", name, "--epochs", epochs, "--resume", "latest"]) == 0
    paths = [tmp_path / name / "checkpoints" / "epoch_2.pt" for name in ("whole", "run")]
    whole, resumed = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_open_clips_line_works_and_other_types_are_refused(tmp_path, capsys):
    common = [*RUN, "--logs", str(tmp_path), "--epochs", "1", "--workers", "0"]
    assert main([*common, "--name", "run", "--dataset-type", "synthetic"]) == 0
    assert main([*common, "--dataset-type", "csv", "--train-data", "synthetic"]) == 2
    assert "--train-data synthetic: of type synthetic, not --dataset-type csv" in capsys.readouterr().err
    assert main([*common, "--train-data", "synthetic:many"]) == 2
    assert "synthetic:many: expected synthetic:TOKENS" in capsys.readouterr().err
