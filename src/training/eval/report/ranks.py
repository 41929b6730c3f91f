"""Files next to the results of a run: the rank of every query, for comparisons between runs; truncated captions."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.eval.metrics import expected_rank, hit_probability
from training.eval.record import DIRECTIONS
from training.eval.retrieval import RankedSet

FILE = "ranks.npz"
_META = "benchmarks"


@dataclass(frozen=True)
class QueryRanks:
    """Ranks of one benchmark in one run.

    Attributes:
        title: name of the benchmark in tables.
        digest: fingerprint of the list of images and captions; it is equal for runs that ranked the same pairs.
        protocol: name of the benchmark's variant; empty if unknown.
        owner: image of each caption, [num_captions] int32.
        images: file names, [num_images].
        rank: direction -> expected rank of the right answer, [num_queries] float32.
        top1: direction -> probability that a right answer comes first (0 or 1 without ties), [num_queries] float32.
    """

    title: str
    digest: str
    protocol: str
    owner: np.ndarray
    images: np.ndarray
    rank: dict[str, np.ndarray]
    top1: dict[str, np.ndarray]


def write_ranks(ranked: Sequence[RankedSet], path: Path) -> None:
    """Writes the ranks of all benchmarks of a run, replacing those of an earlier evaluation."""
    arrays, meta = {}, {}
    for r in ranked:
        key = r.result.key
        meta[key] = {"title": r.pairs.title, "digest": r.pairs.fingerprint(), "protocol": r.pairs.protocol}
        arrays[f"{key}/owner"] = np.array(r.pairs.image_of_caption, dtype=np.int32)
        arrays[f"{key}/images"] = np.array([path.name for path in r.pairs.image_paths])
        for direction in DIRECTIONS:
            counts = getattr(r, direction)
            arrays[f"{key}/{direction}-rank"] = expected_rank(counts).to(torch.float32).numpy()
            arrays[f"{key}/{direction}-top1"] = hit_probability(counts, 1).to(torch.float32).numpy()
    np.savez_compressed(path, **{_META: np.array(json.dumps(meta))}, **arrays)


def read_ranks(run: str | Path) -> dict[str, QueryRanks]:
    """Reads the ranks of an evaluation.

    Args:
        run: folder LOGS/NAME, or the file itself.

    Returns:
        Key of each benchmark -> its ranks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not contain ranks.
    """
    path = Path(run) / FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(
            f"{run}: no {FILE} in this folder; evaluate the model with --logs and --name, then give that folder"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays[_META]))
        ranks = {}
        for key, about in meta.items():
            rank, top1 = ({d: arrays[f"{key}/{d}-{name}"] for d in DIRECTIONS} for name in ("rank", "top1"))
            ranks[key] = QueryRanks(
                **about, owner=arrays[f"{key}/owner"], images=arrays[f"{key}/images"], rank=rank, top1=top1
            )
        return ranks
    except Exception as error:  # zipfile's, numpy's and json's own errors have no common base
        raise ValueError(f"{path}: not ranks of an evaluation ({type(error).__name__}: {error})") from error


def write_cut_captions(ranked: Sequence[RankedSet], path: Path) -> int:
    """Writes a CSV of the captions that the tokenizer truncates, in the order of the benchmarks.

    Args:
        ranked: benchmarks.
        path: the file.

    Returns:
        The number of captions written.
    """
    rows = []
    for r in ranked:
        for row in (r.lost_tokens > 0).nonzero()[:, 0].tolist():
            name = r.pairs.image_paths[r.pairs.image_of_caption[row]].name
            rows.append([r.pairs.title, row + 1, name, int(r.lost_tokens[row]), r.pairs.captions[row]])
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([["benchmark", "caption_number", "image", "lost_tokens", "caption"], *rows])
    return len(rows)
