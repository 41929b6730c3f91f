"""FLAIR: weights with the published keys against a plain implementation, and re-ranking against brute force."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import layer_norm, linear, normalize

import training
from dataloaders.urban1k import read_urban1k
from support import end_ranks, evaluate, free_ports, set_rank, start_ranks
from training.eval.encode import ComputeOptions, Encoder
from training.eval.metrics import expected_rank
from training.eval.rerank import count_listed
from training.main import main
from training.model.towers import flair

DIM, WIDTH, HEADS = 24, 32, 3
VISION = {"image_size": 32, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, str, dict[str, torch.Tensor]]:
    """Returns a small FLAIR as --model and --pretrained, and its weights with the published keys."""
    folder = tmp_path_factory.mktemp("flair")
    config = {"embed_dim": DIM, "pooling_heads": HEADS, "init_logit_bias": -10, "vision_cfg": VISION}
    (folder / "small.json").write_text(json.dumps(config | {"text_cfg": TEXT | {"num_corner_token": 0}}))
    torch.manual_seed(0)
    names = open_clip.CLIP(DIM, VISION, TEXT, init_logit_bias=-10).state_dict()
    state = {key: torch.randn_like(value) * 0.3 for key, value in names.items()}
    state["image_post.proj"], state["text_post.proj"] = state.pop("visual.proj"), state.pop("text_projection")
    for name in ("ln_q", "ln_k", "ln_v"):
        state |= {f"visual_proj.{name}.weight": torch.rand(DIM) + 0.5, f"visual_proj.{name}.bias": torch.randn(DIM)}
    for name, shape in (("in_proj_", (3 * DIM, DIM)), ("out_proj.", (DIM, DIM))):
        state |= {f"visual_proj.attn.{name}weight": torch.randn(shape) * 0.3}
        state |= {f"visual_proj.attn.{name}bias": torch.randn(shape[0]) * 0.3}
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "flair.pt")
    return f"config:{folder / 'small.json'}", str(folder / "flair.pt"), state


def plain_features(state: dict, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns class token, patches and texts, projected; the towers are open_clip's."""
    clip = open_clip.CLIP(DIM, VISION, TEXT, init_logit_bias=-10).eval()
    own = {k: v for k, v in state.items() if k in clip.state_dict()}
    own |= {"visual.proj": state["image_post.proj"], "text_projection": state["text_post.proj"]}
    clip.load_state_dict(own)
    clip.visual.output_tokens = True
    with torch.no_grad():
        image, patches = clip.visual(pixels)
        return image, patches @ state["image_post.proj"], clip.encode_text(ids)


def plain_pooling(state: dict, query: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Pools the patches of one image [num, dim] with one text [dim], as the paper describes it."""
    own = {key.removeprefix("visual_proj."): value for key, value in state.items()}
    names = ("ln_q", "ln_k", "ln_v")
    inputs = (query[None], patches, patches)
    normed = [layer_norm(x, (DIM,), own[f"{n}.weight"], own[f"{n}.bias"]) for n, x in zip(names, inputs)]
    weights, biases = own["attn.in_proj_weight"].chunk(3), own["attn.in_proj_bias"].chunk(3)
    q, k, v = (linear(x, w, b) for x, w, b in zip(normed, weights, biases))
    k, v = (torch.cat([x, torch.zeros(1, DIM)]) for x in (k, v))  # the empty token
    size = DIM // HEADS
    parts = []
    for head in range(HEADS):
        columns = slice(head * size, (head + 1) * size)
        attention = (q[:, columns] @ k[:, columns].T / size**0.5).softmax(dim=-1)
        parts.append(attention @ v[:, columns])
    return linear(torch.cat(parts, dim=1), own["attn.out_proj.weight"], own["attn.out_proj.bias"])[0]


def plain_scores(state: dict, patches: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Returns [num_images, num_texts]: the cosine of each text with the feature that it pools from each image."""
    rows = [[plain_pooling(state, text, own) for text in texts] for own in patches]
    return torch.stack([(normalize(torch.stack(row), dim=1) * normalize(texts, dim=1)).sum(1) for row in rows])


@pytest.mark.parametrize("max_pairs", [1, 3, 8192])
def test_features_and_scores_equal_a_plain_implementation(small, max_pairs):
    name, file, state = small
    model = training.create_model(name, file).eval()
    ids = training.get_tokenizer(name)(["a dog", "Two red cars on a road. " * 9, "snow"])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image, patches, texts = plain_features(state, pixels, ids)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.encode_text(ids), texts, rtol=1e-5, atol=1e-5)
        found = flair.encode_with_patches(model.visual, pixels)[1]
        torch.testing.assert_close(found, patches, rtol=1e-5, atol=1e-5)
        scores = flair.conditioned_scores(model.visual_proj, texts.expand(2, -1, -1), found, max_pairs)
    torch.testing.assert_close(scores, plain_scores(state, patches, texts), rtol=0, atol=1e-5)


def test_a_saved_folder_gives_the_same_model(small, tmp_path):
    model = training.create_model(*small[:2])
    folder = training.save_pretrained(model, tmp_path / "saved", training.get_tokenizer(small[0]))
    again = training.create_model(f"local-dir:{folder}").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_the_published_size_is_open_clips(small):
    training.register_model_configs()
    ours, theirs = open_clip.get_model_config("flair-ViT-B-16"), open_clip.get_model_config("ViT-B-16")
    assert ours.pop("pooling_heads") == 8 and ours.pop("init_logit_bias") == -10
    assert ours["text_cfg"].pop("num_corner_token") == 0 and ours == theirs


def brute_ranks(candidates: torch.Tensor, scores: torch.Tensor, owner: list[int]) -> tuple[list, list]:
    """Returns mean ranks (over ties) of images and texts, from a full matrix whose other entries are -1e10."""
    matrix = torch.full((len(candidates), len(owner)), -1e10, dtype=torch.float64)
    matrix.scatter_(1, candidates, scores.double())

    def rank(row: list[float], right: list[int]) -> float:
        best = max(row[n] for n in right)
        wrong = [value for n, value in enumerate(row) if n not in right]
        num_tied, num_right = sum(value == best for value in wrong), sum(row[n] == best for n in right)
        return 1 + sum(value > best for value in wrong) + num_tied / (num_right + 1)

    images = [rank(row.tolist(), [t for t, o in enumerate(owner) if o == i]) for i, row in enumerate(matrix)]
    return images, [rank(column.tolist(), [owner[t]]) for t, column in enumerate(matrix.T)]


def test_counts_equal_those_of_the_full_matrix():
    torch.manual_seed(0)
    owner = [0, 0, 1, 2, 2, 2, 3, 4, 5, 6]
    for k in (1, 3, 10):
        for _ in range(20):
            candidates = torch.rand(7, 10).topk(k).indices
            scores = torch.randint(0, 4, (7, k)) / 4  # with ties
            found = [expected_rank(counts).tolist() for counts in count_listed(candidates, scores, torch.tensor(owner))]
            assert found == [pytest.approx(expected) for expected in brute_ranks(candidates, scores, owner)]


def check_queries(rank: int, name: str, file: str, port: int) -> None:
    from training.model.assembly.factory import EncoderParts
    from training.runtime.distributed import DistEnv
    from training.runtime.watchdog import joined_ranks

    set_rank(rank, 2, port)
    model, tokenizer = training.create_model(name, file).eval(), training.get_tokenizer(name)
    texts, asked = [f"{n} dogs" for n in range(7)], []
    options = ComputeOptions(batch_size=2, workers=0)
    alone = DistEnv(0, 1, torch.device("cpu"))
    expected = (
        Encoder(EncoderParts(model, None, tokenizer, None), alone, options).texts(texts, normalise=False).features
    )
    with joined_ranks("cpu", 30) as (env, _):
        parts = EncoderParts(model, None, lambda part: asked.extend(part) or tokenizer(part), None)
        found = Encoder(parts, env, options).texts(texts, count_lost=False, normalise=False).features
    assert torch.equal(found, expected) and asked == [t for n, t in enumerate(texts) if n // 2 % 2 == rank], asked


def test_processes_divide_the_captions_of_reranking(small):
    assert end_ranks(start_ranks(check_queries, 2, small[0], str(small[1]), free_ports(1)[0])) == [0, 0]


def test_rerank_equals_brute_force(small, scenes, tmp_path, capsys):
    name, file, state = small
    flags = ["--urban1k-retrieval", scenes / "urban1k", "--pretrained", file, "--rerank", 4, "--batch-size", 7]
    record = evaluate(tmp_path, name, *flags)
    assert "4 reranked" in capsys.readouterr().out
    pairs = read_urban1k(scenes / "urban1k")
    _, _, transform = training.create_model_and_transforms(name, file)
    pixels = torch.stack([transform(Image.open(path)) for path in pairs.image_paths])
    image, patches, texts = plain_features(state, pixels, training.get_tokenizer(name)(list(pairs.captions)))
    candidates = (normalize(image, dim=1) @ normalize(texts, dim=1).T).topk(4).indices
    scores = plain_scores(state, patches, texts).gather(1, candidates)
    for direction, ranks in zip(("i2t", "t2i"), brute_ranks(candidates, scores, list(range(len(texts))))):
        expected = sum(ranks) / len(ranks)
        assert record[f"urban1k-retrieval-reranked-{direction}-mean-rank"] == pytest.approx(expected)
    assert record["urban1k-retrieval-t2i-mean-rank"] != record["urban1k-retrieval-reranked-t2i-mean-rank"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "ViT-S-32-alt", "--rerank", "4"], "use --model flair-ViT-B-16"),
        (["--model", "ViT-S-32-alt", "--rerank", "0"], "--rerank"),
    ],
)
def test_models_without_pooling_are_refused(flags, said, scenes, tmp_path, capsys):
    argv = ["--urban1k-retrieval", str(scenes / "urban1k"), "--logs", str(tmp_path), "--device", "cpu", *flags]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


def test_flairs_weights_in_another_model_say_what_they_are(small, tmp_path):
    content = json.loads(open(small[0].removeprefix("config:")).read())
    del content["pooling_heads"]
    (tmp_path / "clip.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--model flair-ViT-B-16"):
        training.create_model(f"config:{tmp_path / 'clip.json'}", small[1])
