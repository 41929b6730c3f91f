"""Zero-shot classification: class numbers, open_clip's classifier and accuracy, from flags and during training."""

import json

import numpy as np
import pytest
import torch

from dataloaders.imagenet import read_imagenet, read_prompts
from eval_files import write_imagenet, write_imagenet_v2
from support import end_ranks, evaluate, free_ports, read_results, set_rank, start_ranks
from training.eval.metrics import count_ranks
from training.main import main
from training.readers.images import load_rgb


def test_imagenet_classes_are_numbered_as_open_clip_names_them(tmp_path):
    from open_clip import IMAGENET_CLASSNAMES

    got = read_imagenet(write_imagenet(tmp_path / "val"))
    assert got.labels == (0,) * 3 + (1,) * 3 + (999,) * 3
    assert [IMAGENET_CLASSNAMES[label] for label in got.labels[::3]] == ["tench", "goldfish", "toilet paper"]
    second = read_imagenet(write_imagenet_v2(tmp_path / "v2"), v2=True)
    assert second.labels == (2, 10, 999) and [p.parent.name for p in second.image_paths] == ["2", "10", "999"]
    with pytest.raises(FileNotFoundError, match="are in one folder"):
        read_imagenet(tmp_path / "val" / "n01440764")
    with pytest.raises(ValueError, match="a number from 0 to 999"):
        read_imagenet(tmp_path / "val", v2=True)


def test_zero_shot_equals_open_clip(tmp_path, tiny_clip, capsys, monkeypatch):
    import open_clip

    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:1]  # all 80 would take minutes
    monkeypatch.setattr("training.eval.zero_shot.OPENAI_IMAGENET_TEMPLATES", templates)
    val, v2 = write_imagenet(tmp_path / "val"), write_imagenet_v2(tmp_path / "v2")
    record = evaluate(tmp_path, tiny_clip, "--imagenet-val", val, "--imagenet-v2", v2)
    out = capsys.readouterr().out
    assert "9 of 50,000" in out and "not comparable" in out
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip, load_weights=False)
    model.load_state_dict(torch.load(tiny_clip.removeprefix("local-dir:") + "/open_clip_model.pt", weights_only=True))
    model.eval()
    tokenizer = open_clip.get_tokenizer(tiny_clip)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, open_clip.IMAGENET_CLASSNAMES, templates)
    got = read_imagenet(val)
    with torch.no_grad():
        pixels = torch.stack([preprocess(load_rgb(path)) for path in got.image_paths])
        logits = model.encode_image(pixels, normalize=True) @ classifier
    for k in (1, 5):
        expected = (logits.topk(k).indices == torch.tensor(got.labels)[:, None]).any(dim=1).float().mean()
        assert record[f"imagenet-zeroshot-val-top{k}"] == pytest.approx(float(expected))
    assert record["imagenetv2-zeroshot-val-num-images"] == 3


def test_classes_are_described_by_long_texts(tmp_path, tiny_clip, capsys, caplog):
    """Compares with a plain computation from the file of texts, whose numbers differ by class.

    The two classes with the same name have different texts.
    """
    from open_clip import IMAGENET_CLASSNAMES, create_model, get_tokenizer

    from training.eval.encode import Encoder
    from training.eval.zero_shot import encode_classes
    from training.model.assembly.factory import EncoderParts
    from training.runtime.watchdog import joined_ranks

    names = dict.fromkeys(IMAGENET_CLASSNAMES)
    described = {name: [f"A photo of a {name}, {k} of them." for k in range(1 + i % 3)] for i, name in enumerate(names)}
    described["tench"] = ["A fish that is green and lies in the arms of an angler. " * 20]
    described["n04008634"] = ["It flies."]  # the second class that is called missile
    path, val = tmp_path / "texts.json", write_imagenet(tmp_path / "val")
    path.write_text(json.dumps({"imagenet1k": described}))
    record = evaluate(tmp_path, tiny_clip, "--imagenet-val", val, "--imagenet-prompts", path)
    assert "accuracy in percent, texts.json (sha256" in capsys.readouterr().out
    assert "1 of 1,998 class descriptions are longer than the model's context" in caplog.text
    assert record["imagenet-zeroshot-val-prompts"].startswith("texts.json (sha256")

    model, tokenizer = create_model(tiny_clip).eval(), get_tokenizer(tiny_clip)
    with torch.no_grad():
        features = [
            model.encode_text(tokenizer(described["n04008634"] if i == 744 else described[name]), normalize=True).mean(
                0
            )
            for i, name in enumerate(IMAGENET_CLASSNAMES)
        ]
    expected = torch.nn.functional.normalize(torch.stack(features), dim=1)
    parts = EncoderParts(model, None, tokenizer, None)
    with joined_ranks("cpu", 30) as (env, _):
        got = encode_classes(Encoder(parts, env), read_prompts(path).texts).features
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(got[744], got[657], atol=1e-3) and IMAGENET_CLASSNAMES[744] == "missile"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected an object of class name -> list of texts, found a list"),
        ({"tench": ["a fish"], "unicorn": ["a horse"]}, "no class is called unicorn (1 in all)"),
        (
            {"tench": ["a fish"]},
            "no texts for goldfish, great white shark, tiger shark, hammerhead shark, electric ray ..",
        ),
        ({"tench": "a fish"}, "class 'tench': expected a list of texts"),
        ({"tench": ["a fish", " "]}, "class 'tench': expected a list of texts, at least one and none of them empty"),
    ],
)
def test_a_file_of_descriptions_that_does_not_fit_is_refused(tmp_path, capsys, content, message):
    path, val = tmp_path / "texts.json", write_imagenet(tmp_path / "val", 1)
    path.write_text(json.dumps(content))
    argv = ["--model", "lotlip_tiny", "--imagenet-val", val, "--imagenet-prompts", path, "--logs", tmp_path]
    assert main([str(word) for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_a_second_run_with_a_feature_cache_encodes_nothing(tmp_path, tiny_clip, monkeypatch):
    import open_clip

    monkeypatch.setattr("training.eval.zero_shot.OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:1])
    flags = ["--imagenet-val", write_imagenet(tmp_path / "val"), "--imagenet-v2", write_imagenet_v2(tmp_path / "v2")]
    plain = evaluate(tmp_path, tiny_clip, *flags)
    flags += ["--feature-cache", tmp_path / "cache"]
    first = evaluate(tmp_path, tiny_clip, *flags)
    monkeypatch.setattr("training.eval.encode.Encoder._encode", None)
    second = evaluate(tmp_path, tiny_clip, *flags)
    for key, value in plain.items():
        if "-zeroshot-" in key:
            assert first[key] == second[key] == value, key


def check_classifier(rank: int, name: str, port: int) -> None:
    import open_clip

    import training
    from training.eval.encode import Encoder
    from training.eval.zero_shot import encode_classes
    from training.model.assembly.factory import EncoderParts
    from training.runtime.distributed import DistEnv
    from training.runtime.watchdog import joined_ranks

    set_rank(rank, 2, port)
    names, templates = open_clip.IMAGENET_CLASSNAMES[:25], open_clip.OPENAI_IMAGENET_TEMPLATES[:2]
    model, tokenizer = training.create_model(name).eval(), training.get_tokenizer(name)
    with joined_ranks("cpu", 30) as (env, _):
        parts = EncoderParts(model, None, tokenizer, None)
        class_texts = [[template(name) for template in templates] for name in names]
        classes = encode_classes(Encoder(parts, env), class_texts).features
        alone = encode_classes(Encoder(parts, DistEnv(0, 1, env.device)), class_texts).features
        expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
        assert env.world_size == 2 and torch.equal(classes, alone)
        torch.testing.assert_close(classes.T, expected, atol=1e-6, rtol=0)


def test_processes_build_one_classifier(tiny_clip):
    assert end_ranks(start_ranks(check_classifier, 2, tiny_clip, free_ports(1)[0])) == [0, 0]


def test_short_benchmarks_are_evaluated_in_mid_training(tmp_path, scenes, monkeypatch):
    import open_clip

    monkeypatch.setattr("training.eval.zero_shot.OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:1])
    argv = [
        "--model",
        "lotlip_tiny",
        "--train-data",
        scenes / "train",
        "--batch-size",
        20,
        "--epochs",
        1,
        "--workers",
        0,
    ]
    argv += [
        "--imagenet-val",
        write_imagenet(tmp_path / "val", 1),
        "--logs",
        tmp_path,
        "--name",
        "r",
        "--device",
        "cpu",
    ]
    assert main([str(word) for word in argv]) == 0
    logged = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert read_results(tmp_path, "r")["imagenet-zeroshot-val-num-images"] == 3
    assert [line["imagenet-zeroshot-val-top1"] for line in logged if "imagenet-zeroshot-val-top1" in line]


def test_label_ranks_by_brute_force():
    rng = np.random.default_rng(0)
    features, classifier = torch.tensor(rng.normal(size=(50, 6))), torch.tensor(rng.normal(size=(6, 9)))
    classifier[:, 4] = classifier[:, 3]  # two classes with equal scores
    labels = torch.tensor(rng.integers(0, 9, 50))
    _, counts = count_ranks(classifier.T, features, labels, tile=(4, 7), both=False)
    score = (features @ classifier).numpy()
    for i, label in enumerate(labels.tolist()):
        own = score[i, label]
        assert counts.better[i] == sum(score[i] > own + 1e-9)
        assert counts.tied[i] == sum(abs(score[i] - own) <= 1e-9) - 1 == (label in (3, 4))
