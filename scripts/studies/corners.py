"""Measures what the corner tokens of a finished run contribute: their distance from [CLS], attention and retrieval.

    python scripts/studies/corners.py OUT/ARM-sSEED EVALUATION [..] [--captions 200]

EVALUATION is one of the study's evaluations; its captions are encoded again. The numbers are written to
OUT/ARM-sSEED/corners.json, and `run.py` copies them to study.json:

    cosine           means over captions: corners with [CLS], corners with each other, [CLS] of two captions
    r1               I2T and T2I by [CLS] alone (as in all tables), by the mean of [CLS] and the corners,
                     and by each corner alone
    words            for words that get more than the mean attention in the last layer: which fraction of a corner's
                     words [CLS] doesn't have, and which fraction of two corners' words both have
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from open_clip_train.precision import get_autocast
from torch.nn.functional import normalize

from training.eval.encode import ComputeOptions, Encoder
from training.eval.metrics import count_ranks, hit_probability
from training.eval.retrieval import encode_sets, plan_benchmarks
from training.model.assembly.factory import EncoderParts
from training.model.assembly.from_flags import build_from_flags
from training.model.towers.encoders import cut_padding
from training.model.towers.text_tower import special_attention
from training.runtime.watchdog import joined_ranks


@torch.no_grad()
def all_features(parts: EncoderParts, texts: Sequence[str], precision: str) -> torch.Tensor:
    """Returns normalised features [n, m + 1, dim] of [CLS] and the m corners."""
    tower, order, found = parts.model.text, sorted(range(len(texts)), key=lambda i: len(texts[i])), {}
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        ids = cut_padding(parts.tokenizer([texts[i] for i in batch]), tower.pad_id)
        with get_autocast(precision, device_type="cpu")():
            features = tower.all_features(ids)
        found |= dict(zip(batch, normalize(features.float(), dim=-1)))
    return torch.stack([found[i] for i in range(len(texts))])


def cosines(features: torch.Tensor) -> dict[str, float]:
    """Returns mean cosines of features [n, m + 1, dim] over captions."""
    similar = torch.einsum("nid,njd->ij", features, features) / len(features)
    corners = similar[1:, 1:]
    pairs = corners[~torch.eye(len(corners), dtype=torch.bool)]
    other = (features[1:, 0] * features[:-1, 0]).sum(dim=-1)
    found = {"corners_with_cls": float(similar[0, 1:].mean()), "cls_with_other_captions": float(other.mean())}
    return found | ({"corners_with_each_other": float(pairs.mean())} if len(pairs) else {})


def recall(images: torch.Tensor, features: torch.Tensor, owner: torch.Tensor) -> dict[str, list[float]]:
    """Returns R@1, I2T and T2I, for each way to use the m + 1 features of a caption."""
    kinds = {"cls": features[:, 0], "mean": normalize(features.mean(dim=1), dim=-1)}
    kinds |= {f"corner {n}": features[:, n] for n in range(1, features.shape[1])}
    return {
        name: [float(hit_probability(counts, 1).mean()) for counts in count_ranks(images, texts, owner)]
        for name, texts in kinds.items()
    }


def words(parts: EncoderParts, texts: Sequence[str]) -> dict[str, float]:
    """Compares the words that [CLS] and the corners read; returns means over captions.

    A token reads a word if the word gets more than the token's mean attention per word.
    """
    by_corner_alone, shared = [], []
    for text in texts:
        ids = cut_padding(parts.tokenizer([text]), parts.model.text.pad_id)
        attention = special_attention(parts.model.text, ids)[0]
        own = torch.stack([attention[:, places].sum(dim=1) for _, places in parts.tokenizer.words(ids[0].tolist())])
        read = own > own.mean(dim=0)  # [words, m + 1]
        for corner in read.T[1:]:
            by_corner_alone.append(float((corner & ~read[:, 0]).sum() / corner.sum()))
        for one, other in combinations(read.T[1:], 2):
            shared.append(float((one & other).sum() / (one | other).sum()))
    found = {"of_a_corner_not_of_cls": sum(by_corner_alone) / len(by_corner_alone)}
    return found | ({"shared_by_two_corners": sum(shared) / len(shared)} if shared else {})


def main() -> int:
    """Runs the command line; returns 0, or exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("evaluations", nargs="+", help="names of its evaluations")
    parser.add_argument(
        "--captions", type=int, default=200, metavar="N", help="captions to count words in (default: %(default)s)"
    )
    args = parser.parse_args()
    found = {}
    try:
        for name in args.evaluations:
            line = (args.run / name / "checkpoints" / "results.jsonl").read_text().splitlines()[-1]
            flags = argparse.Namespace(**json.loads(line)["flags"])
            with joined_ranks("cpu", 30) as (env, _):
                parts = build_from_flags(flags, env.device)
                if not getattr(getattr(parts.model, "text", None), "num_corners", 0):
                    raise ValueError(f"{args.run}: its model has no corner tokens")
                work = plan_benchmarks(flags)
                options = ComputeOptions.from_flags(flags, feature_cache=flags.feature_cache)
                encoded = next(encode_sets(Encoder(parts, env, options), work))
            captions, owner = encoded.pairs.captions, torch.tensor(encoded.pairs.image_of_caption)
            features = all_features(parts, captions, flags.precision)
            found[name] = {"cosine": cosines(features), "r1": recall(encoded.images, features, owner)}
            found[name]["words"] = words(parts, captions[: args.captions])
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    (args.run / "corners.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
