"""Retrieval from files to R@1: each picture once and captions by length, against every benchmark by itself.

The sets are drawn scenes in the published layouts, their sizes in the published proportion: SV-10k contains SV-1k, no
other pictures are shared.
"""

import torch

import training
from benchmarks import published
from benchmarks.measure import Figure, Setting, fastest
from dataloaders.dci import read_dci
from dataloaders.iiw import read_iiw
from dataloaders.pairs import RetrievalSet
from dataloaders.scenes import write_scenes
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from training.distributed import DistEnv
from training.encode import ComputeOptions
from training.model.factory import EncoderParts
from training.retrieval import evaluate_retrieval, plan_retrieval

PUBLISHED_SIZES = {"share4v": 10_000, "dci": 7805, "iiw": 612, "urban1k": 1000}


def make_sets(setting: Setting, scale: int) -> list[RetrievalSet]:
    """All five sets, a `scale`-th of their published sizes."""
    roots = {}
    for seed, (name, size) in enumerate(PUBLISHED_SIZES.items()):
        roots[name] = setting.folder / f"scenes_{name}"
        write_scenes(roots[name], num_train=0, num_test=max(8, size // scale), seed=seed)
    share4v = roots["share4v"] / "share4v"
    sizes = (PUBLISHED_SIZES["share4v"] // 10 // scale, PUBLISHED_SIZES["share4v"] // scale)
    return [
        *read_share4v(str(share4v), str(share4v / "anno.json"), sizes),
        read_dci(str(roots["dci"] / "dci")),
        read_iiw(str(roots["iiw"] / "iiw"), None),
        read_urban1k(str(roots["urban1k"] / "urban1k")),
    ]


def run(setting: Setting) -> list[Figure]:
    """One process, no loader processes: what is left is the work itself."""
    name, scale = setting.pick(("lotlip_tiny", 200), ("lotlip_tiny", 20), ("lotlip_bert-ViT-B-16", 1))
    torch.manual_seed(0)
    model, _, preprocess = training.create_model_and_transforms(name, pretrained_text=False)
    tokenizer = training.get_tokenizer(name)
    model = model.to(setting.device).eval()
    sets = make_sets(setting, scale)
    env = DistEnv(0, 1, setting.device)
    options = ComputeOptions(batch_size=64, workers=0)
    parts = EncoderParts(model, preprocess, tokenizer, preprocess)

    def ours() -> dict[str, tuple[float, float]]:
        records = evaluate_retrieval(parts, plan_retrieval(sets, False), env, options)
        return {r["key"]: (r["i2t"]["top1"], r["t2i"]["top1"]) for r in records}

    def baseline() -> dict[str, tuple[float, float]]:
        return {
            s.key: published.evaluate_set(
                model, preprocess, tokenizer, s.image_paths, s.captions, options.batch_size, setting.device
            )
            for s in sets
        }

    got, expected = ours(), baseline()
    for key, recalls in expected.items():
        # An untrained model's near ties may fall either way in fp32: at most one pair of a set.
        size = next(len(s.captions) for s in sets if s.key == key)
        if any(abs(a - b) > 1.001 / size for a, b in zip(got[key], recalls)):
            raise AssertionError(f"evaluation, {key}: R@1 {got[key]}, the baseline has {recalls}")
    seconds = fastest({"baseline": baseline, "ours": ours}, setting)
    num_pairs = sum(len(s.captions) for s in sets)
    return [
        Figure(
            "evaluation",
            f"evaluation of five sets, {num_pairs:,} pairs: {name}, from files to R@1",
            {"time_ratio": seconds["baseline"] / seconds["ours"]},
            {
                "seconds": seconds,
                "pairs_per_s": {side: num_pairs / value for side, value in seconds.items()},
                "images_encoded": {
                    "baseline": sum(len(s.image_paths) for s in sets),
                    "ours": len(plan_retrieval(sets, False).images.paths),
                },
            },
        )
    ]
