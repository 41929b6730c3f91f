"""What new files add: a benchmark in dataloaders/, a family of encoders, a text tower in a file of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import losses, read_metrics

import training
from dataloaders.registry import benchmarks
from eval_files import write_image
from support import read_results
from training.main import main

PLUGIN = """
from pathlib import Path

from dataloaders.pairs import one_caption_per_image
from dataloaders.registry import Benchmark, Option


def _read(args):
    root, number = Path(args.moon_retrieval), int(args.moon_number)
    pairs = [(root / f"{n}.jpg", f"Crater {n} of the moon") for n in range(number)]
    return [one_caption_per_image("moon-retrieval", "Moon", pairs, num_published=number, source="look up")]


BENCHMARKS = (
    Benchmark(
        "moon",
        "--moon-retrieval",
        "folder of craters",
        _read,
        options=(Option("--moon-number", "craters to read", metavar="N", default=3),),
    ),
)
"""
RUN = """
import sys
import dataloaders
dataloaders.__path__.append(sys.argv[1])
from training.flags.parser import build_parser
from training.main import main
root, logs, model = sys.argv[2:]
assert "--moon-retrieval DIR" in build_parser().format_help()
common = ["--model", model, "--logs", logs, "--name", "run", "--workers", "0", "--device", "cpu"]
assert main(["--moon-retrieval", root, *common, "--dry-run"]) == 0
assert main(["--moon-retrieval", root, *common, "--dry-run", "--moon-number", "5"]) == 2
sys.exit(main(["--moon-retrieval", root, *common, "--report"]))
"""


def test_a_new_file_adds_a_benchmark(tmp_path, tiny_clip):
    folder, root = tmp_path / "plugin", tmp_path / "moon"
    folder.mkdir()
    (folder / "moon.py").write_text(PLUGIN)
    for number in range(3):
        write_image(root / f"{number}.jpg", number)
    argv = [sys.executable, "-c", RUN, str(folder), str(root), str(tmp_path / "logs"), tiny_clip]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Moon: complete, 3 pairs" in done.stdout and "2 of 5 pairs are missing" in done.stderr
    result = read_results(tmp_path / "logs", "run")
    assert result["moon-retrieval-num-pairs"] == 3 and result["flags"]["moon_number"] == 3
    assert "Moon" in (tmp_path / "logs" / "run" / "report.html").read_text()


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
