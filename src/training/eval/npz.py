"""Features on disk, one .npz per benchmark: written by --save-features, read by --features, from any framework.

image_features    [num_images, dim]     floating point, of any length: normalised when read
text_features     [num_captions, dim]
image_of_caption  [num_captions]        optional: row of each caption's image; else caption i belongs to image i
captions          [num_captions]        optional: texts
image_paths       [num_images]          optional: image files, absolute or relative to the .npz; for thumbnails
lost_tokens       [num_captions]        optional: tokens that a tokenizer cut off
title             ()                    optional: name in tables; else the file's
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
from training.model.factory import EncoderParts
from training.runtime.distributed import DistEnv

SUFFIX = "-retrieval"
KINDS = ("image", "text")
NUM_CHECKED = 32  # captions that are encoded again to recognise a model
SAME_MODEL = 0.99  # bf16 against fp32 reaches 0.999


def write_features(ranked: RankedSet, images: Encoding, texts: Encoding, folder: Path) -> Path:
    """Writes one benchmark to ``FOLDER/KEY.npz``.

    Args:
        ranked: which rows belong to it.
        images, texts: what they are rows of.
        folder: made if need be.
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
    """Reads benchmarks as features.

    Returns:
        The sets, and features of their images and captions, one set after another, L2-normalised float32.

    Raises:
        FileNotFoundError, ValueError: a file is absent, no .npz, or its arrays do not fit together.
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
    # Zeros at the end change no similarity: files of different models go into one table.
    images, texts = (torch.cat([pad(a[kind], (0, dim - a[kind].shape[1])) for _, a in loaded]) for kind in KINDS)
    lost = torch.cat([arrays["lost"] for _, arrays in loaded])
    return work, Encoding(images, {}, torch.zeros(len(images), dtype=torch.int64)), Encoding(texts, {}, lost)


def check_text_model(
    parts: EncoderParts, captions: Sequence[str], texts: Encoding, env: DistEnv, options: ComputeOptions
) -> None:
    """Encodes some captions again: changed ones are compared with the features of a file, so both must be of one model.

    Raises:
        ValueError: the features of the file are not those of the model.
    """
    rows = torch.linspace(0, len(captions) - 1, min(NUM_CHECKED, len(captions))).long()
    own = encode_texts(parts.model, parts.tokenizer, [captions[i] for i in rows], env, options).features
    dim = min(own.shape[1], texts.features.shape[1])  # the features of several files are padded with zeros
    cosine = float((own[:, :dim] * texts.features[rows, :dim]).sum(dim=1).min())
    if own.shape[1] > texts.features.shape[1] or cosine < SAME_MODEL:
        raise ValueError(
            f"--features: text_features are not what --model makes of the same captions (cosine {cosine:.3f}, expected "
            f"{SAME_MODEL} at least); give the model and the weights that made the file, and captions in it"
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
            raise ValueError(f"{where}: {name} is of shape {arrays[name].shape}, expected ({expected},)")
    if not np.issubdtype(owner.dtype, np.integer) or not np.array_equal(np.unique(owner), np.arange(num_images)):
        raise ValueError(f"{where}: image_of_caption must hold rows of image_features, and each of them at least once")
    # A place under a file that is no folder is nowhere: images without a path have no thumbnail.
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
        raise ValueError(f"{where}: holds NaN or infinity")
    return normalize(tensor, dim=-1)
