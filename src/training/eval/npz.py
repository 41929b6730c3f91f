"""Features and ranks of an evaluation on disk.

Features are one .npz file per benchmark, written by --save-features or any other software, read by --features.

image_features    [num_images, dim]     floating point, of any norm: they are normalised when read
text_features     [num_captions, dim]   likewise
image_of_caption  [num_captions]        optional: row of each caption's image; default: caption i belongs to image i
captions          [num_captions]        optional: texts
image_paths       [num_images]          optional: image files for thumbnails, absolute or relative to the .npz file
lost_tokens       [num_captions]        optional: number of tokens that the tokenizer cut off
title             ()                    optional: name in tables; default: name of the file
protocol          ()                    optional: name of the benchmark's variant, such as dci/short+extra

The ranks of every query, for comparisons between runs, are in ranks.npz next to the results.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from dataloaders.pairs import RetrievalSet, check_list
from dataloaders.registry import benchmarks
from training.eval.metrics import expected_rank, hit_probability
from training.eval.record import DIRECTIONS
from training.eval.retrieval import EncodedSet, RankedSet, check_names

SUFFIX = "-retrieval"
FILE = "ranks.npz"
_META = "benchmarks"


def write_features(encoded: EncodedSet, folder: Path) -> Path:
    """Writes one benchmark to ``FOLDER/KEY.npz``; the folder is created if it does not exist; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{encoded.pairs.key}.npz"
    pairs = encoded.pairs
    arrays: dict[str, Any] = {"image_features": encoded.images.numpy(), "text_features": encoded.texts.numpy()}
    arrays |= {"lost_tokens": encoded.lost_tokens.numpy(), "image_of_caption": np.array(pairs.image_of_caption)}
    texts = {"captions": pairs.captions, "image_paths": [os.path.abspath(str(path)) for path in pairs.image_paths]}
    texts |= {"title": pairs.title, "protocol": pairs.protocol}
    arrays |= {name: np.array(value) for name, value in texts.items()}
    np.savez(path, **arrays)
    return path


def read_features(paths: list[str]) -> list[EncodedSet]:
    """Reads benchmarks from files of features, and normalises these.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not an .npz file, or its arrays are inconsistent.
    """
    sets = [_read_one(Path(path)) for path in paths]
    check_names([s.pairs for s in sets])
    return sets


def _read_one(path: Path) -> EncodedSet:
    where = f"--features {path}"
    arrays = _load(path, where)
    images, texts = (_normalised(arrays.get(name), f"{where}: {name}") for name in ("image_features", "text_features"))
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"{where}: image_features and text_features have different numbers of columns")
    if "image_of_caption" not in arrays and len(images) != len(texts):
        raise ValueError(f"{where}: {len(images):,} images, {len(texts):,} captions and no image_of_caption")
    defaults = {
        # Images without a path get one that can't exist, below the .npz file, and so have no thumbnail.
        "image_paths": [f"{path.name}/image {n}" for n in range(len(images))],
        "captions": [f"caption {n}" for n in range(len(texts))],
        "image_of_caption": np.arange(len(texts)),
        "lost_tokens": np.full(len(texts), -1),
    }
    names, captions, owner, lost = (np.asarray(arrays.get(name, default)) for name, default in defaults.items())
    for name, array in zip(defaults, (names, captions, owner, lost)):
        expected = (len(images if name == "image_paths" else texts),)
        if array.shape != expected:
            raise ValueError(f"{where}: {name} has shape {array.shape}, expected {expected}")
    if not np.issubdtype(owner.dtype, np.integer) or not np.array_equal(np.unique(owner), np.arange(len(images))):
        raise ValueError(f"{where}: image_of_caption must contain rows of image_features, each of them at least once")
    key = path.stem.removesuffix(SUFFIX)
    content = (tuple(path.parent / str(name) for name in names), tuple(map(str, captions)), tuple(owner.tolist()))
    title, protocol = str(arrays.get("title", key)), str(arrays.get("protocol", ""))
    pairs = RetrievalSet(f"{key}{SUFFIX}", title, *content, protocol=protocol)
    if official := {k: v for b in benchmarks() for k, v in b.protocols.items()}.get(pairs.protocol):
        pairs = check_list(pairs, official)
    return EncodedSet(pairs, images, texts, torch.from_numpy(lost.astype(np.int64)))


def _load(path: Path, what: str, missing: str = "no such file") -> dict[str, np.ndarray]:
    """Reads all arrays of a file; `what` names it in messages, and `missing` is said if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {missing}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile's, numpy's and pickle's own errors have no common base
        raise ValueError(
            f"{what}: not a .npz of plain arrays ({error}); texts must be of dtype str, not object"
        ) from error


def _normalised(features: np.ndarray | None, where: str) -> torch.Tensor:
    if features is None or features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not len(features):
        found = "nothing" if features is None else f"{features.dtype} of shape {features.shape}"
        raise ValueError(f"{where}: expected floating point [number, dim], found {found}")
    tensor = torch.from_numpy(features.astype(np.float32, copy=False))
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: contains NaN or infinity")
    return normalize(tensor, dim=-1, out=tensor)  # in place: there is one copy


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
    arrays: dict[str, Any] = {}
    meta = {}
    for r in ranked:
        key = r.result.key
        meta[key] = {"title": r.pairs.title, "digest": r.pairs.fingerprint(), "protocol": r.pairs.protocol}
        arrays[f"{key}/owner"] = np.array(r.pairs.image_of_caption, dtype=np.int32)
        arrays[f"{key}/images"] = np.array([path.name for path in r.pairs.image_paths])
        for direction in DIRECTIONS:
            counts = getattr(r, direction)
            arrays[f"{key}/{direction}-rank"] = expected_rank(counts).to(torch.float32).numpy()
            arrays[f"{key}/{direction}-top1"] = hit_probability(counts, 1).to(torch.float32).numpy()
    arrays[_META] = np.array(json.dumps(meta))
    np.savez_compressed(path, **arrays)


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
    arrays = _load(
        path, str(run), f"no {FILE} in this folder; evaluate the model with --logs and --name, then give that folder"
    )
    ranks = {}
    try:
        for key, about in json.loads(str(arrays[_META])).items():
            rank, top1 = ({d: arrays[f"{key}/{d}-{name}"] for d in DIRECTIONS} for name in ("rank", "top1"))
            ranks[key] = QueryRanks(
                **about, owner=arrays[f"{key}/owner"], images=arrays[f"{key}/images"], rank=rank, top1=top1
            )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not ranks of an evaluation ({type(error).__name__}: {error})") from error
    return ranks
