"""Diagnostics of long text against brute force; they distinguish a trained model from a random one."""

import itertools
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import training
from dataloaders.pairs import retrieval_set
from dataloaders.scene_drawing import draw_scene, make_scene
from support import read_results
from training.eval.changes import CHANGES, list_changes, wrong_sentence
from training.eval.diagnostics import diagnose, monotonicity
from training.eval.encode import ComputeOptions, Encoder
from training.eval.report.figures import above_chance, draw_card
from training.eval.retrieval import EncodedSet, plan_retrieval, rank_set
from training.main import main
from training.model.assembly.factory import EncoderParts
from training.readers.captions import split_caption
from training.runtime.distributed import DistEnv

ENV = DistEnv(0, 1, torch.device("cpu"))


def test_each_change_is_what_its_name_says():
    own = ["a", "b", "c", "d", "e"]
    made = {name: change(list(own), 0) for name, change in CHANGES.items()}
    assert made["first sentence dropped"] == ["b", "c", "d", "e"]
    assert made["first moved to fourth place"] == ["b", "c", "d", "a", "e"]
    assert made["first and fourth swapped"] == ["d", "b", "c", "a", "e"]
    assert made["neutral sentence in front"] == ["This is a photo", *own]
    assert made["4 neutral sentences in front"] == ["This is a photo"] * 4 + own
    assert sorted(made["sentences shuffled"]) == own != made["sentences shuffled"]
    assert len(made["one sentence dropped at random"]) == 4
    for name in ("first moved to fourth place", "first and fourth swapped"):
        assert CHANGES[name](["a", "b", "c"], 0) == ["a", "b", "c"]
    assert CHANGES["first sentence dropped"](["a"], 0) == ["a"]


def test_himo_by_hand():
    similarity = [
        np.array([0.1, 0.2, 0.3, 0.4, 0.5]),  # 5 sentences: segments end after 2, 5 and after 1, 3, 5
        np.array([0.1, 0.3, 0.2]),  # ends after 1, 3 (rises), and after 1, 2, 3 (falls)
        np.array([0.2, 0.2]),  # a tie is wrong
        np.array([0.9]),  # too short
    ]
    cut = [[False] * 4, [False] * 2, [True], []]
    found = monotonicity(similarity, cut, torch.arange(4))
    assert (found["2"]["score"], found["2"]["captions"], found["2"]["left_out"]) == (pytest.approx(2 / 3), 3, 1)
    assert (found["2"]["tied"], found["2"]["tied_by_cut"]) == (1, 1)
    assert (found["3"]["score"], found["3"]["captions"], found["3"]["left_out"]) == (0.5, 2, 2)
    assert found["K"]["score"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert (found["K"]["captions"], found["K"]["tied"]) == (3, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Writes 24 images with captions of one to eight sentences of twenty words."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    words = ["red", "blue", "small", "dog", "tree", "house", "on", "the", "left", "walks"]
    for folder in ("caption", "image"):
        (root / folder).mkdir()
    for n in range(24):
        text = " ".join(" ".join(rng.choice(words, 20)) + "." for _ in range(1 + n % 8))
        (root / "caption" / f"{n}.txt").write_text(text)
        pixels = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(root / "image" / f"{n}.jpg")
    return root


class ByHand:
    """An evaluation with --diagnostics, its captions as sentences, and the model for a plain computation."""

    def __init__(self, data, model_name, logs):
        argv = ["--urban1k-retrieval", str(data), "--model", model_name, "--workers", "0", "--device", "cpu"]
        assert main([*argv, "--report", "--diagnostics", "--logs", str(logs), "--name", "r"]) == 0
        self.folder = logs / "r"
        self.found = read_results(logs, "r")["diagnostics"]["Urban1k"]
        self.model, _, preprocess = training.create_model_and_transforms(model_name)
        self.tokenizer = training.get_tokenizer(model_name)
        self.own = [split_caption((data / "caption" / f"{n}.txt").read_text()) for n in range(24)]
        with torch.no_grad():
            pixels = torch.stack([preprocess(Image.open(data / "image" / f"{n}.jpg")) for n in range(24)])
            self.images = self.model.eval().encode_image(pixels, normalize=True).double()

    def encode(self, texts):
        with torch.no_grad():
            return torch.cat([self.model.encode_text(self.tokenizer([t]), normalize=True).double() for t in texts])


@pytest.fixture(scope="module")
def run(data, tiny_clip, tmp_path_factory):
    return ByHand(data, tiny_clip, tmp_path_factory.mktemp("logs"))


def top1(score, target):
    better, tied = (score > target + 1e-6).sum(1), ((score - target).abs() <= 1e-6).sum(1)
    return float(((better == 0) / tied).mean())


def test_changes_against_brute_force(run):
    found = run.found["changes"]
    for name, change in CHANGES.items():
        changed = [". ".join(change(list(s), 0)) for s in run.own]
        score = run.images @ run.encode(changed).T
        assert found[name]["i2t"]["top1"] == pytest.approx(top1(score, score.diag()[:, None]))
        t2i = found[name]["t2i"]
        assert t2i["top1"] == pytest.approx(top1(score.T, score.diag()[:, None]))
        assert t2i["difference"] == pytest.approx(t2i["top1"] - found["as it is"]["t2i"]["top1"])
        assert t2i["low"] <= t2i["difference"] <= t2i["high"]
        assert found[name]["changed"] == sum(c != ". ".join(s) for c, s in zip(changed, run.own))


def test_recall_by_position_against_brute_force(run):
    for position in range(1, 9):
        there = [n for n in range(24) if len(run.own[n]) >= position]
        if len(there) < 10:
            assert str(position) not in run.found["positions"]
            continue
        score = run.encode([run.own[n][position - 1] for n in there]) @ run.images.T
        target = score[range(len(there)), there][:, None]
        assert run.found["positions"][str(position)]["t2i"] == pytest.approx(top1(score, target))
        assert run.found["positions"][str(position)]["captions"] == len(there)


def test_himo_against_brute_force(run):
    own, himo = run.own, run.found["himo"]
    for segments in (2, 3):
        right, tied = [], 0
        for n in (n for n in range(24) if len(own[n]) >= segments):
            texts = [". ".join(own[n][: len(own[n]) * k // segments]) for k in range(1, segments + 1)]
            ids = [tuple(run.tokenizer([text])[0].tolist()) for text in texts]
            s = (run.encode(texts) @ run.images[n]).tolist()
            same = [a == b for a, b in itertools.pairwise(ids)]
            right.append(all(b > a for a, b in itertools.pairwise(s)) and not any(same))
            tied += any(same)
        assert himo[str(segments)]["score"] == pytest.approx(np.mean(right))
        assert himo[str(segments)]["tied_by_cut"] == tied > 0  # 77 tokens hold three of these sentences
        assert himo[str(segments)]["left_out"] == sum(len(s) < segments for s in own)
    correlations = []
    for n in (n for n in range(24) if len(own[n]) > 1):
        s = (run.encode([". ".join(own[n][:k]) for k in range(1, len(own[n]) + 1)]) @ run.images[n]).numpy()
        correlations.append(np.corrcoef(np.arange(len(s)), s)[0, 1])
    assert himo["K"]["score"] == pytest.approx(np.mean(correlations), abs=1e-4)


def test_wrong_sentences_against_brute_force(run):
    captions = [". ".join(own) for own in run.own]
    for name, cut_to in (("after the first sentence", 1), ("after the whole caption", None)):
        margins, same = [], 0
        for n, own in enumerate(run.own):
            wrong = wrong_sentence(captions, range(24), n, 0)
            assert wrong not in own and any(wrong in run.own[other] for other in range(24) if other != n)
            texts = [". ".join(own[:cut_to]), ". ".join([*own[:cut_to], wrong])]
            if torch.equal(*(run.tokenizer([text]) for text in texts)):
                same += 1
                continue
            short, long = (run.encode(texts) @ run.images[n]).tolist()
            margins.append(short - long)
        found = run.found["wrong_sentence"][name]
        assert (found["captions"], found["left_out"], found["tied_by_cut"]) == (len(margins), same, same)
        assert found["score"] == pytest.approx(np.mean(np.array(margins) > 0))
        assert found["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
        assert found["ci95"][0] <= found["score"] <= found["ci95"][1]
        assert found["margin_ci95"][0] <= found["margin"] <= found["margin_ci95"][1]
    assert run.found["wrong_sentence"]["after the first sentence"]["captions"] == 24
    assert run.found["wrong_sentence"]["after the whole caption"]["tied_by_cut"] > 0  # 77 tokens hold three sentences


def test_saved_features_give_the_same_diagnostics(data, tiny_clip, tmp_path, capsys):
    """With saved image features, a model's text tower gives the same answers as the model; other models are refused."""
    common = ["--model", tiny_clip, "--workers", "0", "--device", "cpu", "--logs", str(tmp_path), "--diagnostics"]
    assert main(["--urban1k-retrieval", str(data), *common, "--save-features", "--name", "whole"]) == 0
    file = str(tmp_path / "whole" / "features" / "urban1k-retrieval.npz")
    assert main(["--features", file, *common, "--name", "texts"]) == 0
    whole, texts = (read_results(tmp_path, name) for name in ("whole", "texts"))
    assert whole["lengths"] == texts["lengths"]
    before, after = (dict(flat(own["diagnostics"])) for own in (whole, texts))
    # Features are normalised again when they are read, so the last bits may differ.
    assert before.keys() == after.keys() and all(after[k] == pytest.approx(v, abs=1e-5) for k, v in before.items())
    assert "first sentence dropped" in capsys.readouterr().out

    other = ["--features", file, *common, "--model", "lotlip_tiny", "--name", "other"]
    assert main([*other, "--pretrained", str(save_tiny(tmp_path))]) == 2
    assert "text_features are not those of --model for the same captions" in capsys.readouterr().err


def flat(content, path=()):
    """Yields the path and the value of every leaf of nested dicts and lists."""
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from flat(value, (*path, key))
    else:
        yield path, content


def save_tiny(folder):
    torch.save(training.create_model("lotlip_tiny").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def test_a_model_at_chance_gets_a_message_instead_of_a_card(data, tiny_clip, tmp_path, capsys):
    run = ByHand(data, tiny_clip, tmp_path)
    said = capsys.readouterr().out
    assert "first moved to fourth place" in said and "No long-text card: with fewer than 10 right answers" in said
    assert not (run.folder / "long_text_card.png").exists()
    assert "Long-text card" not in (run.folder / "report.html").read_text()


NUM_WORDS = 8192


def tokenize(texts):
    """Returns [n, 400]: a number for every run of one to eight words within a sentence, padded with 0."""
    ids = torch.zeros(len(texts), 400, dtype=torch.int64)
    for row, text in enumerate(texts):
        own = []
        for sentence in split_caption(text.lower()):
            words = sentence.replace(",", "").split()
            runs = (words[a:b] for a in range(len(words)) for b in range(a + 1, min(a + 8, len(words)) + 1))
            own += [1 + zlib.crc32(" ".join(run).encode()) % (NUM_WORDS - 1) for run in runs]
        ids[row, : len(own[:400])] = torch.tensor(own[:400])
    return ids


class SceneReader(torch.nn.Module):
    """A model that encodes images as 12 x 12 pixels, and texts as the sum of one vector for each run of words."""

    def __init__(self, weights, mean):
        super().__init__()
        self.weights, self.mean = weights, mean

    def encode_image(self, pixels):
        return pixels.flatten(1) - self.mean

    def encode_text(self, ids):
        return counted(ids) @ self.weights


def counted(ids):
    counts = torch.zeros(len(ids), NUM_WORDS).scatter_add_(1, ids, torch.ones(ids.shape))
    counts[:, 0] = 0
    return counts


def small(image):
    return torch.from_numpy(np.asarray(image.resize((12, 12), Image.Resampling.BOX), dtype=np.float32) / 255)


def scenes_and_captions(split, number):
    scenes = [make_scene(0, split, n) for n in range(number)]
    return [draw_scene(s, 48) for s in scenes], [". ".join(s.long_caption(0)) for s in scenes]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs diagnostics on a model trained on 1,500 scenes (by ridge regression) and on one with random vectors."""
    images, captions = scenes_and_captions("train", 1500)
    pixels = torch.stack([small(image) for image in images]).flatten(1)
    words = counted(tokenize(captions))
    mean = pixels.mean(0)
    # Ridge regression from words to pixels, in its dual form.
    learned = words.T @ torch.linalg.solve(words @ words.T + 30 * torch.eye(len(words)), pixels - mean)
    guessed = torch.randn(learned.shape, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("scenes")
    images, captions = scenes_and_captions("test", 300)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    rows = [(folder / f"{number}.png", [text]) for number, text in enumerate(captions)]
    work = plan_retrieval([retrieval_set("scenes", "Scenes", rows)], allow_missing=False)
    found = {}
    options = ComputeOptions(workers=0, sort_texts=False)
    for name, weights in (("learned", learned), ("random", guessed)):
        parts = EncoderParts(SceneReader(weights, mean), small, tokenize, small)
        encoder = Encoder(parts, ENV, options)
        images = encoder.images(work.sets[0].image_paths)
        texts = encoder.texts(work.sets[0].captions, count_lost=False)
        encoded = EncodedSet(work.sets[0], images.features, texts.features, texts.lost_tokens)
        found[name] = diagnose(encoder, [rank_set(encoded, ENV)], list_changes(tokenize, diagnostics=True))[
            "diagnostics"
        ]
    return found


def test_diagnostics_distinguish_a_trained_model_from_a_random_one(reports):
    learned, guessed = reports["learned"]["Scenes"], reports["random"]["Scenes"]
    assert learned["changes"]["as it is"]["t2i"]["top1"] > 0.15 > 0.02 > guessed["changes"]["as it is"]["t2i"]["top1"]
    for name in ("first sentence dropped", "one sentence dropped at random"):
        for direction in ("i2t", "t2i"):
            assert learned["changes"][name][direction]["high"] < 0  # the omitted content is missed
            assert guessed["changes"][name][direction]["low"] <= 0 <= guessed["changes"][name][direction]["high"]
    for name in ("first moved to fourth place", "first and fourth swapped", "sentences shuffled"):
        assert learned["changes"][name]["t2i"]["difference"] == 0  # this model doesn't encode the order of sentences
    for number in ("2", "3", "K"):
        assert learned["himo"][number]["ci95"][0] > guessed["himo"][number]["ci95"][1]
    assert abs(guessed["himo"]["K"]["score"]) < 0.2
    refused, by_chance = (found["wrong_sentence"]["after the whole caption"] for found in (learned, guessed))
    assert refused["ci95"][0] > by_chance["ci95"][1] and refused["margin_ci95"][0] > 0
    recall = [learned["changes"][f"query of {n} words"]["t2i"]["top1"] for n in (4, 8, 16)]
    assert recall == sorted(recall) and recall[-1] > 2 / 300
    alone, by_chance = (np.mean([p["t2i"] for p in found["positions"].values()]) for found in (learned, guessed))
    assert alone > 2 * by_chance and alone > 2 / 300


def test_the_card_is_drawn_only_for_the_trained_model(reports, tmp_path):
    assert above_chance(reports["learned"]) == ["Scenes"] and above_chance(reports["random"]) == []
    curve = {"10": {"i2t": 0.2, "t2i": 0.2}, "77": {"i2t": 0.6, "t2i": 0.6}}
    lengths = {"context_length": 77, "sets": {"Scenes": {"tokens": curve, "sentences": curve}}}
    lengths |= {"effective_length": {"Scenes": 70.0, "all": 70.0}}
    lengths |= {"effective_length_ci95": {"Scenes": [60.0, 77.0], "all": [60.0, 77.0]}}
    figure = draw_card("a model", {"lengths": lengths, "diagnostics": reports["learned"]})
    said = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
    assert any("Effective length: 70 (95%: 60 to 77) tokens of 77" in text for text in said)
    figure.savefig(tmp_path / "card.png")
    assert Image.open(tmp_path / "card.png").width > 500
