"""Agreement of R@1 between precisions: captions with some words changed are queries for their originals."""

from contextlib import nullcontext

import torch
from torch.nn.functional import normalize

import training
from benchmarks.measure import CONTEXT_LENGTH, Figure, Setting, reference_captions
from training.eval.metrics import count_ranks, summarise
from training.model.towers.hf_tower import CornerHFText

CHANGED = 0.3
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def run(setting: Setting) -> list[Figure]:
    """Measures R@1 in each precision, with an untrained text tower.

    It still maps similar captions to similar features, so R@1 is far from chance.
    """
    name, count = setting.pick(("lotlip_tiny", 128), ("lotlip_tiny", 512), ("lotlip_bert-ViT-B-16", 4096))
    torch.manual_seed(0)
    tower = training.create_model(name, pretrained_text=False).text.to(setting.device).eval()
    originals = reference_captions(count, 1, tower.num_corners)[1][:, 0]
    stream = torch.Generator().manual_seed(1)
    is_word = (originals >= 1000) & (originals < 30522)
    changes = is_word & (torch.rand(originals.shape, generator=stream) < CHANGED)
    queries = torch.where(changes, torch.randint(1000, 30522, originals.shape, generator=stream), originals)
    recalls = {}
    for precision, dtype in PRECISIONS.items():
        if dtype is torch.float16 and not setting.on_gpu:
            continue  # nobody evaluates in fp16 on a CPU
        autocast = torch.autocast(setting.device.type, dtype) if dtype else nullcontext()
        with autocast:
            features = [_encode(tower, ids, setting) for ids in (queries, originals)]
        ranks, _ = count_ranks(features[0], features[1], torch.arange(count))
        recalls[precision] = summarise(ranks)["top1"]
    differences = [abs(value - recalls["fp32"]) for value in recalls.values()]
    title = f"R@1 of {count:,} captions of {CONTEXT_LENGTH} tokens, {CHANGED:.0%} of the words changed, by precision"
    return [Figure("precision", title, {}, {"recall_at_1": recalls, "largest_difference": max(differences)})]


def _encode(tower: CornerHFText, ids: torch.Tensor, setting: Setting) -> torch.Tensor:
    batches = [tower(part.to(setting.device)).float().cpu() for part in ids.split(128)]
    return normalize(torch.cat(batches), dim=-1)
