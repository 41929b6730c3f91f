"""CLIP_benchmark's command line with a LoTLIP model: its numbers equal those of a plain computation."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import training
from eval_files import write_image

NAMES = ["red square", "blue circle", "green star"]
TEMPLATES = ["a photo of a {c}.", "there is a {c} on a long, long table."]
MODEL = "lotlip_tiny"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    model = training.create_model(MODEL)
    assert model.text.num_corners > 0
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def run_clip_benchmark(*argv, **kwargs):
    command = [sys.executable, "-m", "training.clip_benchmark", "eval", "--no_amp", "--num_workers", 0, *argv]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)


def write_sugar_crepe(root):
    """Writes a set in SugarCrepe's layout: a json file of captions and wrong captions, with COCO's images beside it."""
    rows = {}
    for n in range(12):
        write_image(root / "val2017" / f"{n:012d}.jpg", n)
        texts = [f"Number {n} is blue. " * (1 + n), f"Number {n} is green, and so is the sea. " * (1 + n)]
        true, false = texts if n % 2 else reversed(texts)
        rows[str(3 * n)] = {"filename": f"{n:012d}.jpg", "caption": true, "negative_caption": false}
    (root / "add_att.json").write_text(json.dumps(rows))
    return list(rows.values())


def write_classification_shard(root):
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    (root / "test" / "nshards.txt").write_text("1")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for n in range(20):
            pixels = np.random.default_rng(n).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            for suffix, content in (("png", file.getvalue()), ("cls", str(n % 3).encode())):
                member = tarfile.TarInfo(f"{n:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@torch.no_grad()
def test_compositional_and_classification_sets(tmp_path, weights):
    rows = write_sugar_crepe(tmp_path / "data" / "sugar_crepe" / "add_att")
    write_classification_shard(tmp_path / "data" / "shapes")
    argv = ["--model", MODEL, "--pretrained", weights, "--dataset", "sugar_crepe/add_att", "wds/shapes"]
    argv += ["--dataset_root", tmp_path / "data" / "{dataset}", "--output", tmp_path / "{dataset}.json"]
    done = run_clip_benchmark(*argv)
    assert done.returncode == 0, done.stderr

    model, _, transform = training.create_model_and_transforms(MODEL, str(weights))
    model.eval()
    tokenizer = training.get_tokenizer(MODEL)
    right = []
    for row in rows:
        image = Image.open(tmp_path / "data" / "sugar_crepe" / "add_att" / "val2017" / row["filename"])
        texts = model.encode_text(tokenizer([row["caption"], row["negative_caption"]]), normalize=True)
        true, false = (texts @ model.encode_image(transform(image)[None])[0]).tolist()
        right.append(true > false)
    metrics = json.loads((tmp_path / "sugar_crepe_add_att.json").read_text())["metrics"]
    assert metrics["text_acc"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1

    per_class = [[template.format(c=name) for template in TEMPLATES] for name in NAMES]
    features = torch.stack([model.encode_text(tokenizer(texts), normalize=True).mean(0) for texts in per_class])
    classes = torch.nn.functional.normalize(features, dim=1)
    right = []
    with tarfile.open(tmp_path / "data" / "shapes" / "test" / "0.tar") as tar:
        for n in range(20):
            image = Image.open(tar.extractfile(f"{n:03d}.png"))
            right.append((classes @ model.encode_image(transform(image)[None])[0]).argmax().item() == n % 3)
    metrics = json.loads((tmp_path / "shapes.json").read_text())["metrics"]
    assert metrics["acc1"] == pytest.approx(np.mean(right))


def test_weights_that_do_not_fit_are_refused_without_a_traceback(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    write_classification_shard(tmp_path / "shapes")
    argv = ["--model", MODEL, "--pretrained", tmp_path / "weights.pt", "--dataset", "wds/shapes"]
    done = run_clip_benchmark(*argv, "--dataset_root", tmp_path / "shapes", cwd=tmp_path)
    assert done.returncode == 2 and "git lfs" in done.stderr.lower() and "Traceback" not in done.stderr
