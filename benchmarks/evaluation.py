"""Retrieval from files to R@1: each image encoded once and captions batched by length, against each set by itself.

The sets are drawn scenes in the published layouts, with sizes in the published proportion. SV-10k contains SV-1k; no
other images are shared. Images are JPEGs of SA-1B's size. Each caption joins the captions of two scenes, so that most
captions fill the context, as the published ones do.
"""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import training
from benchmarks import published
from benchmarks.measure import Figure, Setting, as_photograph, fastest
from dataloaders.dci import read_dci
from dataloaders.iiw import read_iiw
from dataloaders.pairs import RetrievalSet
from dataloaders.scenes import write_scenes
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from training.data.images import MODES
from training.eval.encode import ComputeOptions, Encoder
from training.eval.retrieval import evaluate_retrieval, plan_retrieval
from training.model.assembly.factory import EncoderParts
from training.readers.files import parallel_map
from training.runtime.distributed import DistEnv

IMAGE_SIZE = (2250, 1500)  # SA-1B's
PUBLISHED_SIZES = {"share4v": 10_000, "dci": 7805, "iiw": 612, "urban1k": 1000}


def make_sets(folder: Path, scale: int, image_size: tuple[int, int] = IMAGE_SIZE) -> list[RetrievalSet]:
    """Writes and reads all five sets, at 1 / `scale` of their published sizes, with images of (width, height)."""
    roots = {}
    for seed, (name, size) in enumerate(PUBLISHED_SIZES.items()):
        roots[name] = folder / f"scenes_{name}"
        write_scenes(roots[name], num_train=0, num_test=max(8, size // scale), seed=seed)
    images = [path for root in roots.values() for path in root.rglob("photos/*.jpg")]
    parallel_map(partial(_enlarge, size=image_size), images)
    share4v = roots["share4v"] / "share4v"
    sizes = (PUBLISHED_SIZES["share4v"] // 10 // scale, PUBLISHED_SIZES["share4v"] // scale)
    sets = [
        *read_share4v(share4v, share4v / "anno.json", sizes),
        read_dci(roots["dci"] / "dci"),
        read_iiw(roots["iiw"] / "iiw"),
        read_urban1k(roots["urban1k"] / "urban1k"),
    ]
    return [replace(s, captions=tuple(map(" ".join, zip(s.captions, s.captions[1:] + s.captions[:1])))) for s in sets]


def _enlarge(path: Path, size: tuple[int, int]) -> None:
    path.write_bytes(as_photograph(path.read_bytes(), size))


def load_parts(name: str, device: torch.device) -> EncoderParts:
    """Returns the model with random weights, which are the same on every call."""
    torch.manual_seed(0)
    model, _, preprocess = training.create_model_and_transforms(name, pretrained_text=False)
    return EncoderParts(model.to(device).eval(), preprocess, training.get_tokenizer(name), preprocess)


def run(setting: Setting) -> list[Figure]:
    """Measures one process, on a CPU without loader processes; on a CPU also two processes."""
    name, scale = setting.pick(("lotlip_tiny", 1000), ("lotlip_tiny", 50), ("lotlip_bert-ViT-B-16", 20))
    workers = (os.cpu_count() or 1) if setting.on_gpu else 0
    parts = load_parts(name, setting.device)
    sets = make_sets(setting.folder, scale, (750, 500) if setting.quick else IMAGE_SIZE)
    work = plan_retrieval(sets, False)
    env = DistEnv(0, 1, setting.device)
    options = ComputeOptions(batch_size=64, workers=workers)

    def ours(options: ComputeOptions) -> dict[str, tuple[float, float]]:
        results = evaluate_retrieval(Encoder(parts, env, options), work)
        return {r.key: (r.i2t.top1, r.t2i.top1) for r in results}

    def baseline() -> dict[str, tuple[float, float]]:
        return {s.key: published.evaluate_set(parts, s, options.batch_size, workers, setting.device) for s in sets}

    sides = {"baseline": baseline} | {m: partial(ours, replace(options, image_decoding=m)) for m in MODES}
    sides["image_cache"] = partial(ours, replace(options, image_cache=str(setting.folder / "cache")))
    if sides["image_cache"]() != sides["image_cache"]():  # the first call fills the cache
        raise AssertionError("evaluation: images from the cache give other recalls")
    # Only `exact` is compared: an untrained model hardly distinguishes images, so other pixels may change any answer.
    results = {mode: sides[mode]() for mode in MODES}
    check_recalls(sets, results["exact"], baseline())
    seconds = fastest(sides, setting)
    num_pairs = sum(len(s.captions) for s in sets)
    title = f"evaluation of five sets, {num_pairs:,} pairs, {workers} loader processes: {name}"
    facts = {
        "pairs_per_s": {side: num_pairs / value for side, value in seconds.items()},
        "images_encoded": {"baseline": sum(len(s.image_paths) for s in sets), "ours": len(set(work.identity.values()))},
    }
    figures = []
    for mode in MODES:
        suffix, flag = ("", "") if mode == "exact" else (f"_{mode}", f", --image-decoding {mode}")
        figures.append(_figure(f"evaluation{suffix}", title + flag, seconds["baseline"], seconds[mode], facts))
    kept = f"{title}, --image-cache, second run, against the same without"
    figures.append(_figure("evaluation_image_cache", kept, seconds["exact"], seconds["image_cache"], facts))
    if not setting.on_gpu and not setting.quick:
        figures.append(_over_processes(setting, name, sets, seconds["exact"]))
    return figures


def _figure(name: str, title: str, baseline: float, ours: float, facts: dict[str, object]) -> Figure:
    seconds = {"baseline": baseline, "ours": ours}
    return Figure(name, title, {"time_ratio": baseline / ours}, {"seconds": seconds, **facts})


def check_recalls(sets: list[RetrievalSet], got: dict, expected: dict) -> None:
    """Raises AssertionError if R@1 differs by more than one pair; near ties may be decided differently in fp32."""
    for s in sets:
        if any(abs(a - b) > 1.001 / len(s.captions) for a, b in zip(got[s.key], expected[s.key])):
            raise AssertionError(f"evaluation, {s.key}: R@1 {got[s.key]}, the baseline has {expected[s.key]}")


def _over_processes(setting: Setting, name: str, sets: list[RetrievalSet], alone: float) -> Figure:
    """Measures two processes with one thread each against this process, which should have OMP_NUM_THREADS=1."""
    mp.spawn(_one_of_two, (name, sets, setting.repeats, setting.folder), nprocs=2)
    together = float((setting.folder / "seconds").read_text())
    title = f"the same over 2 processes of 1 thread, against one process of {torch.get_num_threads()}"
    return _figure("evaluation_processes", title, alone, together, {"processes": {"baseline": 1, "ours": 2}})


def _one_of_two(rank: int, name: str, sets: list[RetrievalSet], repeats: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    device = torch.device("cpu")
    work, best = plan_retrieval(sets, False), float("inf")
    encoder = Encoder(load_parts(name, device), DistEnv(rank, 2, device), ComputeOptions(batch_size=64, workers=0))
    for turn in range(repeats + 1):  # the first warms up
        dist.barrier()
        start = time.perf_counter()
        evaluate_retrieval(encoder, work)
        dist.barrier()
        best = min(best, time.perf_counter() - start) if turn else best
    if rank == 0:
        (folder / "seconds").write_text(str(best))
    dist.destroy_process_group()
