"""Retrieval from files to R@1: each picture once and captions by length, against every benchmark by itself.

The sets are drawn scenes in the published layouts, their sizes in the published proportion: SV-10k contains SV-1k, no
other pictures are shared. Pictures are JPEGs of 7 times the model's width, as SA-1B's 1,500 pixels are of 224; captions
are two scenes' long, so that most fill the context, as the published ones do.
"""

import io
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import training
from benchmarks import published
from benchmarks.measure import Figure, Setting, fastest
from dataloaders.dci import read_dci
from dataloaders.files import parallel_map
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


def make_sets(folder: Path, scale: int, width: int) -> list[RetrievalSet]:
    """All five sets, a `scale`-th of their published sizes, for a model that takes pictures of `width` pixels."""
    roots = {}
    for seed, (name, size) in enumerate(PUBLISHED_SIZES.items()):
        roots[name] = folder / f"scenes_{name}"
        write_scenes(roots[name], num_train=0, num_test=max(8, size // scale), seed=seed)
    pictures = [path for root in roots.values() for path in root.rglob("photos/*.jpg")]
    parallel_map(partial(_enlarge, width=7 * width), pictures)
    share4v = roots["share4v"] / "share4v"
    sizes = (PUBLISHED_SIZES["share4v"] // 10 // scale, PUBLISHED_SIZES["share4v"] // scale)
    sets = [
        *read_share4v(str(share4v), str(share4v / "anno.json"), sizes),
        read_dci(str(roots["dci"] / "dci")),
        read_iiw(str(roots["iiw"] / "iiw"), None),
        read_urban1k(str(roots["urban1k"] / "urban1k")),
    ]
    return [replace(s, captions=tuple(map(" ".join, zip(s.captions, s.captions[1:] + s.captions[:1])))) for s in sets]


def _enlarge(path: Path, width: int) -> None:
    """Grain makes the file as large for its pixels as a photograph's."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((width, width), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(len(path.read_bytes())).normal(0, 6, (width, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    path.write_bytes(buffer.getvalue())


def load_parts(name: str, device: torch.device) -> EncoderParts:
    """The model with random weights, the same each time."""
    torch.manual_seed(0)
    model, _, preprocess = training.create_model_and_transforms(name, pretrained_text=False)
    return EncoderParts(model.to(device).eval(), preprocess, training.get_tokenizer(name), preprocess)


def run(setting: Setting) -> list[Figure]:
    """One process, no loader processes: what is left is the work itself. Then the same over two processes."""
    name, scale = setting.pick(("lotlip_tiny", 200), ("lotlip_tiny", 20), ("lotlip_bert-ViT-B-16", 1))
    parts = load_parts(name, setting.device)
    width = parts.preprocess(Image.new("RGB", (9, 9))).shape[-1]
    sets = make_sets(setting.folder, scale, width)
    work = plan_retrieval(sets, False)
    env = DistEnv(0, 1, setting.device)
    options = ComputeOptions(batch_size=64, workers=0)

    def ours(options: ComputeOptions = options) -> dict[str, tuple[float, float]]:
        records = evaluate_retrieval(parts, work, env, options)
        return {r["key"]: (r["i2t"]["top1"], r["t2i"]["top1"]) for r in records}

    def baseline() -> dict[str, tuple[float, float]]:
        return {s.key: published.evaluate_set(parts, s, options.batch_size, setting.device) for s in sets}

    fast = replace(options, fast_decode=True)
    ours(fast)
    check_recalls(sets, ours(), baseline())
    sides = {"baseline": baseline, "ours": ours, "fast decode": partial(ours, fast)}
    seconds = fastest(sides, setting)
    num_pairs = sum(len(s.captions) for s in sets)
    title = f"evaluation of five sets, {num_pairs:,} pairs, pictures of {7 * width} pixels: {name}"
    facts = {
        "pairs_per_s": {side: num_pairs / value for side, value in seconds.items()},
        "images_encoded": {"baseline": sum(len(s.image_paths) for s in sets), "ours": len(work.images.paths)},
    }
    figures = [
        _figure("evaluation", title, seconds["baseline"], seconds["ours"], facts),
        _figure(
            "evaluation_fast_decode", f"{title}, --fast-decode", seconds["baseline"], seconds["fast decode"], facts
        ),
    ]
    if not setting.on_gpu and not setting.quick:
        figures.append(_over_processes(setting, name, sets, seconds["ours"]))
    return figures


def _figure(name: str, title: str, baseline: float, ours: float, facts: dict[str, object]) -> Figure:
    seconds = {"baseline": baseline, "ours": ours}
    return Figure(name, title, {"time_ratio": baseline / ours}, {"seconds": seconds, **facts})


def check_recalls(sets: list[RetrievalSet], got: dict, expected: dict) -> None:
    """Raises AssertionError if R@1 differs by more than a pair: near ties may fall either way in fp32."""
    for s in sets:
        if any(abs(a - b) > 1.001 / len(s.captions) for a, b in zip(got[s.key], expected[s.key])):
            raise AssertionError(f"evaluation, {s.key}: R@1 {got[s.key]}, the baseline has {expected[s.key]}")


def _over_processes(setting: Setting, name: str, sets: list[RetrievalSet], alone: float) -> Figure:
    """Two processes of one thread each against this one (run with OMP_NUM_THREADS=1, or it has all cores)."""
    mp.spawn(_one_of_two, (name, sets, setting.repeats, setting.folder), nprocs=2)
    together = float((setting.folder / "seconds").read_text())
    title = f"the same over 2 processes of 1 thread, against one process of {torch.get_num_threads()}"
    return _figure("evaluation_processes", title, alone, together, {"processes": {"baseline": 1, "ours": 2}})


def _one_of_two(rank: int, name: str, sets: list[RetrievalSet], repeats: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    device = torch.device("cpu")
    parts, work, best = load_parts(name, device), plan_retrieval(sets, False), float("inf")
    for turn in range(repeats + 1):  # the first warms up
        dist.barrier()
        start = time.perf_counter()
        evaluate_retrieval(parts, work, DistEnv(rank, 2, device), ComputeOptions(batch_size=64, workers=0))
        dist.barrier()
        best = min(best, time.perf_counter() - start) if turn else best
    if rank == 0:
        (folder / "seconds").write_text(str(best))
    dist.destroy_process_group()
