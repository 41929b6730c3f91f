"""Features on disk, one .npz file per benchmark, written by --save-features or any other software, read by --features.

image_features    [num_images, dim]     floating point, of any norm: they are normalised when read
text_features     [num_captions, dim]   likewise
image_of_caption  [num_captions]        optional: row of each caption's image; default: caption i belongs to image i
captions          [num_captions]        optional: texts
image_paths       [num_images]          optional: image files for thumbnails, absolute or relative to the .npz file
lost_tokens       [num_captions]        optional: number of tokens that the tokenizer cut off
title             ()                    optional: name in tables; default: name of the file
protocol          ()                    optional: name of the benchmark's variant, such as dci/short+extra
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize, pad

from dataloaders.pairs import FoundImages, RetrievalSet
from training.eval.encode import ComputeOptions, Encoding, encode_texts
from training.eval.retrieval import RankedSet, RetrievalWork, check_names
from training.model.assembly.factory import EncoderParts
from training.runtime.distributed import DistEnv

SUFFIX = "-retrieval"
KINDS = ("image", "text")
NUM_CHECKED = 32  # number of captions encoded again to check that the features are those of the model
SAME_MODEL = 0.99  # minimum cosine; bf16 compared with fp32 reaches 0.999


def write_features(ranked: RankedSet, images: Encoding, texts: Encoding, folder: Path) -> Path:
    """Writes one benchmark to ``FOLDER/KEY.npz``.

    Args:
        ranked: the benchmark.
        images, texts: all encoded features, of which `ranked` gives the rows.
        folder: created if it does not exist.

    Returns:
        The path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ranked.result.key}.npz"
    np.savez(
        path,
        image_features=images.features[ranked.image_rows].numpy(),
        text_features=texts.features[ranked.text_rows].numpy(),
        image_of_caption=np.array(ranked.pairs.image_of_caption),
        captions=np.array(ranked.pairs.captions),
        image_paths=np.array([os.path.abspath(str(p)) for p in ranked.pairs.image_paths]),
        lost_tokens=texts.lost_tokens[ranked.text_rows].numpy(),
        title=np.array(ranked.pairs.title),
        protocol=np.array(ranked.pairs.protocol),
    )
    return path


def read_features(paths: list[str]) -> tuple[RetrievalWork, Encoding, Encoding]:
    """Reads benchmarks from files of features.

    Returns:
        The sets, and the features of their images and captions, concatenated over the sets, L2-normalised float32.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not an .npz file, or its arrays are inconsistent.
    """
    loaded = [_read_one(Path(path)) for path in paths]
    sets = [s for s, _ in loaded]
    check_names(sets)
    first_image = np.cumsum([0, *(len(s.image_paths) for s in sets)])
    first_text = np.cumsum([0, *(len(s.captions) for s in sets)])
    found = FoundImages(
        tuple(path for s in sets for path in s.image_paths),
        tuple(tuple(range(first_image[n], first_image[n + 1])) for n in range(len(sets))),
    )
    text_index = [list(range(first_text[n], first_text[n + 1])) for n in range(len(sets))]
    work = RetrievalWork(sets, found, tuple(c for s in sets for c in s.captions), text_index)
    dim = max(arrays["image"].shape[1] for _, arrays in loaded)
    # Appending zeros does not change similarities, so files of models with different dimensions can be combined.
    images, texts = (torch.cat([pad(a[kind], (0, dim - a[kind].shape[1])) for _, a in loaded]) for kind in KINDS)
    lost = torch.cat([arrays["lost"] for _, arrays in loaded])
    return work, Encoding(images, {}, torch.zeros(len(images), dtype=torch.int64)), Encoding(texts, {}, lost)


def check_text_model(
    parts: EncoderParts, captions: Sequence[str], texts: Encoding, env: DistEnv, options: ComputeOptions
) -> None:
    """Checks that features from a file are those of the model, by encoding some captions again.

    Changed captions, encoded by the model, are compared with the file's features, so both must be of the same model.

    Raises:
        ValueError: the features in the file are not those of the model.
    """
    rows = torch.linspace(0, len(captions) - 1, min(NUM_CHECKED, len(captions))).long()
    own = encode_texts(parts.model, parts.tokenizer, [captions[i] for i in rows], env, options).features
    dim = min(own.shape[1], texts.features.shape[1])  # the features of several files are padded with zeros
    cosine = float((own[:, :dim] * texts.features[rows, :dim]).sum(dim=1).min())
    if own.shape[1] > texts.features.shape[1] or cosine < SAME_MODEL:
        raise ValueError(
            f"--features: text_features are not those of --model for the same captions (cosine {cosine:.3f}, expected "
            f"at least {SAME_MODEL}); give the model and weights that the file was made with, and put captions into it"
        )


def _read_one(path: Path) -> tuple[RetrievalSet, dict[str, torch.Tensor]]:
    arrays = _load(path)
    where = f"--features {path}"
    features = {kind: _normalised(arrays.get(f"{kind}_features"), f"{where}: {kind}_features") for kind in KINDS}
    num_images, num_captions = len(features["image"]), len(features["text"])
    if features["image"].shape[1] != features["text"].shape[1]:
        raise ValueError(f"{where}: image_features and text_features have different numbers of columns")
    owner = arrays.get("image_of_caption")
    if owner is None:
        if num_images != num_captions:
            raise ValueError(f"{where}: {num_images:,} images, {num_captions:,} captions and no image_of_caption")
        owner = np.arange(num_captions)
    lengths = {"captions": num_captions, "image_of_caption": num_captions, "lost_tokens": num_captions}
    for name, expected in (lengths | {"image_paths": num_images}).items():
        if name in arrays and arrays[name].shape != (expected,):
            raise ValueError(f"{where}: {name} has shape {arrays[name].shape}, expected ({expected},)")
    if not np.issubdtype(owner.dtype, np.integer) or not np.array_equal(np.unique(owner), np.arange(num_images)):
        raise ValueError(f"{where}: image_of_caption must contain rows of image_features, each of them at least once")
    # Images without a path get one that can't exist, below the .npz file, and so have no thumbnail.
    names = arrays.get("image_paths", [path / f"image {n}" for n in range(num_images)])
    texts = arrays.get("captions", [f"caption {n}" for n in range(num_captions)])
    key = path.stem.removesuffix(SUFFIX)
    pairs = RetrievalSet(
        f"{key}{SUFFIX}",
        str(arrays.get("title", key)),
        tuple(path.parent / str(name) for name in names),
        tuple(str(text) for text in texts),
        tuple(owner.tolist()),
        protocol=str(arrays.get("protocol", "")),
    )
    lost = torch.from_numpy(arrays.get("lost_tokens", np.full(num_captions, -1)).astype(np.int64))
    return pairs, features | {"lost": lost}


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"--features {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile's, numpy's and pickle's own errors have no common base
        raise ValueError(
            f"--features {path}: not a .npz of plain arrays ({error}); texts must be of dtype str, not object"
        ) from error


def _normalised(features: np.ndarray | None, where: str) -> torch.Tensor:
    if features is None or features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not len(features):
        found = "nothing" if features is None else f"{features.dtype} of shape {features.shape}"
        raise ValueError(f"{where}: expected floating point [number, dim], found {found}")
    tensor = torch.from_numpy(features.astype(np.float32))
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: contains NaN or infinity")
    return normalize(tensor, dim=-1)
