"""Cache of features on disk, so that an evaluation encodes each image and text only once per tower.

    DIR/TOWER/features.safetensors    features [n, dim] float32, lost_tokens [n], key [n, 32] (SHA-256 of each item)

TOWER is a hash of everything that changes a feature: the tower's weights, structure and settings, what it makes of a
fixed image or text, the reading of images or the tokenizer, and the precision. For an image tower with a linear head,
the trunk's features are cached, so that models with the same locked trunk share them.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.data.images import ImageReader
from training.eval.encode import ComputeOptions, Encoding, encode_images, run_tower
from training.eval.image_cache import image_key
from training.model.assembly.factory import EncoderParts
from training.model.towers.image_encoder import image_encoder
from training.model.towers.locking import HEAD, apply_linear_head, linear_head
from training.model.weights.fingerprint import PROBE_TEXTS, fingerprint, probe_images, rounded, tokenizer_fingerprint
from training.runtime.distributed import DistEnv, on_main_rank
from training.runtime.files import atomic_write

FORMAT = 3  # part of the hash: after a change, old files are not used
NAME = "features.safetensors"
logger = logging.getLogger(__name__)


def text_key(text: str) -> bytes:
    """Returns the key of a caption."""
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def describe_image_tower(
    model: torch.nn.Module,
    preprocess: Callable,
    precision: str = "fp32",
    image_decoding: str = "exact",
    cut_head: bool = False,
) -> dict[str, object]:
    """Returns everything that changes an image's features, as values for JSON; the features of a probe are among it.

    Args:
        model: any open_clip model in eval mode.
        preprocess: PIL image -> [3, H, W].
        precision, image_decoding: see `ComputeOptions`.
        cut_head: the features are those before the tower's `linear_head`.
    """
    head = HEAD if cut_head and linear_head(model.visual) else None
    pixels = [ImageReader(preprocess, image_decoding)(file) for file in probe_images()]
    tower = image_encoder(model, cut_head)
    return {
        "tower": fingerprint(model.visual, leave_out=head),
        "probe": rounded(run_tower(tower, pixels[0][None], _device_of(model), precision)),
        "pixels": sha256(torch.cat([p.flatten() for p in pixels]).numpy()).hexdigest(),
        "precision": precision,
        "image_decoding": image_decoding,
    }


def describe_text_tower(model: torch.nn.Module, tokenizer: Callable, precision: str) -> dict[str, object]:
    """Does for texts what `describe_image_tower` does for images."""
    ids = tokenizer(list(PROBE_TEXTS))
    return {
        "tower": fingerprint(model, leave_out="visual."),
        "probe": rounded(run_tower(model.encode_text, ids, _device_of(model), precision)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "precision": precision,
    }


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def open_caches(
    folder: str, parts: EncoderParts, precision: str, env: DistEnv, image_decoding: str = "exact"
) -> tuple["FeatureCache", "FeatureCache"]:
    """Returns the caches of a model's image tower and text tower."""
    image = describe_image_tower(parts.model, parts.preprocess, precision, image_decoding, cut_head=True)
    text = describe_text_tower(parts.model, parts.tokenizer, precision)
    return FeatureCache(folder, image, env), FeatureCache(folder, text, env)


def encode_images_once(
    cache: "FeatureCache | None",
    parts: EncoderParts,
    paths: Sequence[Path],
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
) -> Encoding:
    """Returns the result of `encode_images`, encoding only files whose features are not in the image tower's cache.

    Args:
        cache: the cache; None encodes all files.
        parts, paths, env, options, allow_broken: see `encode_images`, which also documents what is raised.
    """

    def encode(positions: Sequence[int], without_head: bool = True) -> Encoding:
        chosen = [paths[p] for p in positions]
        return encode_images(parts.model, parts.preprocess, chosen, env, options, allow_broken, without_head)

    if cache is None:
        return encode(range(len(paths)), without_head=False)
    images = cache.encode([image_key(path) for path in paths], encode)
    return replace(images, features=apply_linear_head(parts.model.visual, images.features))


class FeatureCache:
    """Cache of one tower's features.

    Args:
        folder: folder of ``--feature-cache``.
        tower: everything that features depend on except the item, as values for JSON.
        env: rank 0 reads and writes the file; all ranks get the features.
    """

    def __init__(self, folder: str | Path, tower: dict, env: DistEnv):
        described = json.dumps({"format": FORMAT, **tower}, sort_keys=True)
        self.path = Path(folder) / sha256(described.encode()).hexdigest()[:32] / NAME
        self.env = env

    def encode(self, keys: Sequence[bytes], encode: Callable[[list[int]], Encoding]) -> Encoding:
        """Returns the features of all items; encodes and adds those that are not in the cache.

        A file that can't be read or written costs a warning: its features are encoded again, or not kept.

        Args:
            keys: one key per item.
            encode: indices of items -> their encoding, complete on every rank.
        """
        content = on_main_rank(self._load, self.env)
        row_of = {bytes(row): number for number, row in enumerate(content["key"].numpy())}
        missing = [position for position, key in enumerate(keys) if key not in row_of]
        broken: dict[int, str] = {}
        if missing:
            new = encode(missing)
            broken = {missing[position]: reason for position, reason in new.broken.items()}
            new_keys = np.frombuffer(b"".join(keys[p] for p in missing), dtype=np.uint8).reshape(-1, 32).copy()
            added = {"features": new.features, "lost_tokens": new.lost_tokens, "key": torch.from_numpy(new_keys)}
            row_of |= {keys[p]: row for row, p in enumerate(missing, start=len(content["key"]))}
            if len(content["key"]):
                added = {name: torch.cat([content[name], value]) for name, value in added.items()}
            content = added
            good = torch.ones(len(content["key"]), dtype=torch.bool)
            good[[row_of[keys[p]] for p in broken]] = False
            on_main_rank(lambda: self._save({name: value[good] for name, value in content.items()}), self.env)
        rows = torch.tensor([row_of[key] for key in keys], dtype=torch.int64)
        return Encoding(content["features"][rows], broken, content["lost_tokens"][rows])

    def _load(self) -> dict[str, torch.Tensor]:
        nothing = {"features": torch.zeros(0, 0), "lost_tokens": torch.zeros(0, dtype=torch.int64)}
        nothing["key"] = torch.zeros(0, 32, dtype=torch.uint8)
        try:
            if not self.path.is_file():
                return nothing
            content = load_file(self.path)
            return {name: content[name] for name in nothing}
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning(f"--feature-cache: {self.path} can't be read ({error}); its features are encoded again")
            return nothing

    def _save(self, content: dict[str, torch.Tensor]) -> None:
        try:
            with atomic_write(self.path) as temporary:
                save_file(content, temporary)
        except (SafetensorError, OSError) as error:
            logger.warning(f"--feature-cache: {self.path} can't be written ({error}); its features are not kept")
