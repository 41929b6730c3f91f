"""Captions of a vision-language model (tiny, random weights, the real code path) are added to the right samples."""

import gzip
import io
import json
import random
import tarfile
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train_data import write_shard
from tiny_vlm import save_tiny_instructblip, save_tiny_vlm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from training.data.captions import CaptionRule, choose_captions
from training.prepare import recaption
from training.prepare.__main__ import main
from training.prepare.clean import clean_caption
from training.prepare.engines import Generated, TransformersEngine
from training.prepare.recaption import judge
from training.readers.samples import read_samples

PROMPT = "Describe this image in detail"
MAX_TOKENS = 14


def draw(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 18), (37 * number % 256, 255 - 37 * number % 256, 11 * number))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    draw(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(folder: Path) -> Path:
    """Writes three shards of four images, and one sample without an image."""
    folder.mkdir()
    for s in range(3):
        samples = {f"{n:04d}": {"png": png(n), "json": json.dumps({"n": n}).encode()} for n in range(4 * s, 4 * s + 4)}
        if s == 1:
            samples["broken"] = {"png": png(0)[:50], "json": b'{"n": -1}'}
            samples["bare"] = {"png": png(15)}
        write_shard(folder / f"{s}.tar", samples)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"), seed=2)


@pytest.fixture(scope="module")
def other_vlm(tmp_path_factory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm"), seed=3)


@cache
def load(vlm: Path) -> tuple:
    return AutoProcessor.from_pretrained(vlm), LlavaForConditionalGeneration.from_pretrained(vlm).eval()


def answer(vlm: Path, number: int, prompt: str) -> str:
    """Returns the model's answer for one image, without our code."""
    processor, model = load(vlm)
    inputs = processor(images=draw(number), text=f"USER: <image> {prompt} ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(shards: Path, vlm: Path, *words: object) -> int:
    flags = ["--vlm", str(vlm), "--max-tokens", str(MAX_TOKENS), "--batch-size", "3", "--engine", "transformers"]
    return main(["recaption", str(shards), *flags, "--device", "cpu", *map(str, words)])


def records(folder: Path) -> dict[str, dict]:
    return {
        sample.key: json.loads(sample.files.get("json", b"{}"))
        for path in sorted(folder.glob("*.tar"))
        for sample in read_samples(str(path))
    }


def test_each_image_gets_what_the_model_says_of_it(tmp_path, vlm, other_vlm):
    shards = write_set(tmp_path / "set")
    out = ["--out", tmp_path / "new", "--summary", tmp_path / "s.json"]
    assert run(shards, vlm, *out, "--caption", f"longA_captions={PROMPT}", "--caption", "longB_captions=red cat") == 0
    assert run(tmp_path / "new", other_vlm, "--in-place", "--caption", f"longC_captions={PROMPT}") == 0
    got = records(tmp_path / "new")
    asked = {"longA_captions": (vlm, PROMPT), "longB_captions": (vlm, "red cat"), "longC_captions": (other_vlm, PROMPT)}
    different, repetitive = set(), dict.fromkeys(asked, 0)
    for key, (model, prompt) in asked.items():
        for number in (*range(12), 15):
            record = got["bare" if number == 15 else f"{number:04d}"]
            said = " ".join(answer(model, number, prompt).split())
            if key not in record:  # the same words repeated
                assert len(set(said.split()[-4:])) <= 2
                repetitive[key] += 1
                continue
            assert record[key] == said
            different.add(said)
    assert len(different) > 15
    assert got["broken"] == {"n": -1} and got["0003"]["n"] == 3
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["samples"], summary["broken image"]) == (14, 1)
    for key, counts in summary["captions"].items():
        assert (counts["captions"], counts["repetitive"]) == (13 - repetitive[key], repetitive[key])
    assert json.loads((tmp_path / "new" / "sizes.json").read_text()) == {"0.tar": 4, "1.tar": 6, "2.tar": 4}
    with tarfile.open(tmp_path / "new" / "1.tar") as tar:
        assert tar.extractfile("0004.png").read() == png(4)
    rule = CaptionRule(long_caption_keys=tuple(asked), num_long_captions=3, captions="long")
    assert len(choose_captions(got["0001"], rule, random.Random(0))) == 3


def test_a_stopped_run_continues_without_asking_the_model_again(tmp_path, vlm, monkeypatch, capsys):
    shards, words = write_set(tmp_path / "set"), ["--caption", f"long_caption={PROMPT}"]
    assert run(shards, vlm, "--out", tmp_path / "whole", *words) == 0
    real, asked = TransformersEngine.caption, []

    def stopping(self, images, prompt):
        asked.append(len(images))
        if len(asked) == 4:  # in the middle of the second shard
            raise KeyboardInterrupt
        return real(self, images, prompt)

    monkeypatch.setattr(TransformersEngine, "caption", stopping)
    assert run(shards, vlm, "--out", tmp_path / "stopped", *words) == 130
    monkeypatch.setattr(recaption, "rewrite_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(shards, vlm, "--out", tmp_path / "stopped", *words) == 130  # the captions are kept, but not the shard
    monkeypatch.undo()
    asked.clear()

    def counting(self, images, prompt):
        asked.append(len(images))
        return real(self, images, prompt)

    monkeypatch.setattr(TransformersEngine, "caption", counting)
    capsys.readouterr()
    assert run(shards, vlm, "--out", tmp_path / "stopped", *words) == 0
    assert "3 shards, 1 of them before\n14 samples" in capsys.readouterr().out
    assert sum(asked) == 4  # only the images of the third shard
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_a_run_that_was_killed_in_a_line_gives_the_same_bytes(tmp_path, vlm, monkeypatch):
    shards, words = write_set(tmp_path / "set"), ["--caption", f"long_caption={PROMPT}"]
    assert run(shards, vlm, "--out", tmp_path / "whole", *words) == 0
    monkeypatch.setattr(recaption, "rewrite_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(shards, vlm, "--out", tmp_path / "killed", *words) == 130
    monkeypatch.undo()
    (written,) = (tmp_path / "killed" / ".recaption" / "captions").iterdir()
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join([*lines[:2], lines[2][:9]]))  # within the first batch of three
    real, asked = TransformersEngine.caption, []

    def counting(self, images, prompt):
        asked.append(len(images))
        return real(self, images, prompt)

    monkeypatch.setattr(TransformersEngine, "caption", counting)
    assert run(shards, vlm, "--out", tmp_path / "killed", *words) == 0
    assert asked[:2] == [3, 1]  # the batches of an uninterrupted run
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_compressed_shards_and_urls_give_the_same_bytes(tmp_path, vlm):
    shards, words = write_set(tmp_path / "set"), ["--caption", f"long_caption={PROMPT}"]
    assert run(shards, vlm, "--out", tmp_path / "plain", *words) == 0
    (tmp_path / "packed").mkdir()
    for path in shards.glob("*.tar"):
        (tmp_path / "packed" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name, source in (("unpacked", tmp_path / "packed"), ("fetched", f"local://{shards}/*.tar")):
        assert run(source, vlm, "--out", tmp_path / name, *words) == 0
        for path in (tmp_path / "plain").glob("*.tar"):
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes()


def test_ranks_share_the_shards(tmp_path, vlm, monkeypatch):
    shards, words = write_set(tmp_path / "set"), ["--caption", f"long_caption={PROMPT}"]
    assert run(shards, vlm, "--out", tmp_path / "one", *words) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(shards, vlm, "--out", tmp_path / "two", *words) == 0
    assert records(tmp_path / "one") == records(tmp_path / "two") and len(records(tmp_path / "two")) == 14


def test_models_without_a_chat_template(tmp_path):
    """A batch gives the same answers as single images, for InstructBLIP and for LLaVA without its template."""
    images = [draw(n) for n in range(5)]
    bare_llava = save_tiny_vlm(tmp_path / "llava", seed=0, template=False)
    for folder in (save_tiny_instructblip(tmp_path / "blip"), bare_llava):
        engine = TransformersEngine(str(folder), 10, "cpu", None)
        together = engine.caption(images, PROMPT)
        assert together == [engine.caption([image], PROMPT)[0] for image in images]
        assert len({g.text for g in together}) > 1 and all(g.text for g in together)


def test_answers_that_are_no_captions_are_counted():
    assert judge(Generated("I'm sorry, I can't see the image.", True)) == (None, ["refused"])
    assert judge(Generated(" ", True)) == (None, ["empty"])
    assert judge(Generated("A dog " + "and a cat " * 9, False)) == (None, ["repetitive", "cut short"])
    assert judge(Generated("A dog runs. It is brown. The", False)) == (
        "A dog runs. It is brown.",
        ["captions", "cut short"],
    )
    assert judge(Generated("A dog runs", True)) == ("A dog runs", ["captions"])
    assert clean_caption("A dog.").text == "A dog."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--caption", "detailed"], "expected KEY=PROMPT"),
        (["--caption", "a=short", "--caption", "a=detailed"], "--caption a: given twice"),
        (["--caption", "a=short", "--vlm", "{here}/none"], "can't be loaded as a vision-language model"),
        (["--caption", "a=short", "--engine", "vllm"], "--engine vllm"),
        (["--caption", "a=short", "--tensor-parallel", "2"], "needs vLLM"),
        (["--caption", "a=short", "--vllm-args", '{"seed": 1}'], "--vllm-args: needs vLLM"),
        (["--caption", "a=short", "--vllm-args", "seed=1"], "expected a JSON object"),
    ],
)
def test_usage_errors(tmp_path, vlm, words, said, capsys):
    shards = write_set(tmp_path / "set")
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(shards, vlm, "--out", tmp_path / "new", *(word.replace("{here}", str(tmp_path)) for word in words))
    assert stop.value.code == 2 and said in capsys.readouterr().err
