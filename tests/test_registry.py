"""What files outside of the package add: a benchmark, a family of encoders, a text tower in a file of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import losses, read_metrics

import training
from dataloaders.registry import benchmarks, set_further_benchmarks
from eval_files import write_image
from support import read_results
from training.main import main

MOON = """
from pathlib import Path

from dataloaders.pairs import retrieval_set
from dataloaders.registry import Benchmark
from training import Experiment


def read_moon(root, number):
    rows = [(Path(root) / f"{n}.jpg", [f"Crater {n} of the moon"]) for n in range(number)]
    return retrieval_set("moon-retrieval", "Moon", rows, num_published=number)


class Moon(Experiment):
    benchmarks = (
        Benchmark(
            "moon",
            "--moon-retrieval",
            "folder of craters",
            read_moon,
            arguments={"number": "--moon-number"},
            options={"--moon-number N": {"kind": "count", "default": 3, "help": "craters to read"}},
            source="look up",
        ),
    )
"""


def test_an_experiment_adds_a_benchmark(tmp_path, tiny_clip, capsys):
    file, root = tmp_path / "moon.py", tmp_path / "moon"
    file.write_text(MOON)
    for number in range(3):
        write_image(root / f"{number}.jpg", number)
    common = ["--experiment", str(file), "--moon-retrieval", str(root), "--logs", str(tmp_path / "logs")]
    common += ["--model", tiny_clip, "--name", "run", "--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*common, "--help-all"])
    assert "--moon-retrieval DIR" in capsys.readouterr().out
    assert [main([*common, "--dry-run", *more]) for more in ([], ["--moon-number", "5"])] == [0, 2]
    said, err = capsys.readouterr()
    assert "Moon: complete, 3 pairs" in said and "2 of 5 pairs are missing" in err and "look up" in err
    assert main([*common, "--report"]) == 0
    result = read_results(tmp_path / "logs", "run")
    assert result["moon-retrieval-num-pairs"] == 3 and result["flags"]["moon_number"] == 3
    assert "Moon" in (tmp_path / "logs" / "run" / "report.html").read_text()
    set_further_benchmarks(())


def test_shipped_benchmarks_keep_their_flags_and_order():
    published = "dci iiw share4v urban1k docci coco flickr30k imagenet-val imagenet-v2 retrieval-csv retrieval-wds"
    assert [b.name for b in benchmarks()] == published.split()


FAMILY = """
from training.model.towers.hf_tower import ENCODERS, Bert


@ENCODERS.register("electra")
class Electra(Bert):
    default_pooler = "cls_last_hidden_state_pooler"
    has_pooler = False
"""
RUN_FAMILY = """
import sys
import torch
sys.path.append(sys.argv[1])
import electra
from transformers import ElectraConfig
from training.model.towers.hf_tower import CornerHFText
torch.manual_seed(0)
sizes = {"embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
config = ElectraConfig(vocab_size=50, intermediate_size=64, max_position_embeddings=24, **sizes)
text = CornerHFText(config, 16, num_corners=2, context_length=24).eval()
assert text.pooler_type == "cls_last_hidden_state_pooler"
for parameter in text.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
ids = torch.randint(4, 50, (3, 20))
ids[:, 1:3], ids[1, 12:] = torch.tensor([50, 51]), text.pad_id
# A plain version of the rule: one caption at a time, no padding, all positions of all layers.
for row, got in zip(ids, text.all_features(ids)):
    row = row[row != text.pad_id]
    seen = torch.ones(len(row), len(row), dtype=torch.bool)
    seen[:, 1:3] = seen[1:3, 0] = False
    seen |= torch.eye(len(row), dtype=torch.bool)
    states = text.transformer(row[None], attention_mask=torch.ones(1, len(row)), output_hidden_states=True)
    hidden = states.hidden_states[0]
    for layer in text.transformer.encoder.layer:
        hidden = layer(hidden, torch.zeros(1, 1, len(row), len(row)).masked_fill(~seen, -1e30))
    torch.testing.assert_close(got, text.proj(hidden[0, :3]), rtol=0, atol=1e-4)
"""


def test_a_new_file_adds_a_family_of_text_towers(tmp_path):
    (tmp_path / "electra.py").write_text(FAMILY)
    done = subprocess.run(
        [sys.executable, "-c", RUN_FAMILY, str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


TOWER = """
from torch import nn

from training.model.towers.text_tower import TEXT_TOWERS, TextTower


@TEXT_TOWERS.register("bag")
class Bag(TextTower):
    def __init__(self, vocab_size, output_dim, context_length):
        super().__init__()
        self.context_length, self.vocab_size, self.pad_id = context_length, vocab_size, 0
        self.table, self.proj = nn.Embedding(vocab_size, 32), nn.Linear(32, output_dim)

    @classmethod
    def build(cls, spec, stock, cache_dir):
        return cls(spec.text_cfg["vocab_size"], spec.model_cfg["embed_dim"], spec.context_length)

    def all_features(self, ids):
        keep = (ids != self.pad_id)[..., None]
        return self.proj((self.table(ids) * keep).sum(dim=1) / keep.sum(dim=1))[:, None]

    def layers(self):
        return [self.proj]
"""


def test_a_text_tower_in_a_file_of_its_own_is_trained_packed_and_saved(scenes, tmp_path):
    config = json.loads((Path(training.__file__).parent / "model/model_configs/lotlip_tiny.json").read_text())
    config["text_cfg"] = {"tower": "bag", "context_length": 64, "vocab_size": 49408}
    (tmp_path / "bag.json").write_text(json.dumps(config))
    name = f"config:{tmp_path / 'bag.json'}"
    with pytest.raises(ValueError, match="text tower bag: expected one of clip, hugging_face"):
        training.create_model(name)
    (tmp_path / "bag.py").write_text(TOWER)
    spec = importlib.util.spec_from_file_location("bag", tmp_path / "bag.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    curves = {}
    for packing in ("padded", "buckets"):
        argv = ["--model", name, "--train-data", str(scenes / "train"), "--logs", str(tmp_path), "--name", packing]
        argv += ["--workers", "0", "--batch-size", "20", "--epochs", "3", "--lr", "1e-3", "--warmup", "0"]
        assert main([*argv, "--log-every-n-steps", "1", "--text-packing", packing]) == 0
        curves[packing] = losses(read_metrics(tmp_path, packing))
    assert curves["buckets"] == pytest.approx(curves["padded"], rel=1e-4)
    model = training.create_model(name, str(tmp_path / "buckets" / "checkpoints" / "epoch_3.pt")).eval()
    tokenizer = training.get_tokenizer(name)
    training.save_pretrained(model, tmp_path / "saved", tokenizer)
    again, ids = training.create_model(f"local-dir:{tmp_path / 'saved'}").eval(), tokenizer(["a red cube", "two dogs"])
    assert ids.shape == (2, 64) and torch.equal(again.encode_text(ids), model.encode_text(ids))
