"""Cache of features on disk, so that an evaluation encodes each image and text only once per tower.

    DIR/TOWER/features.safetensors    features [n, dim] float32, lost_tokens [n], key [n, 32] (SHA-256 of each item)

TOWER is a hash of the tower's weights, of the preprocessing or tokenizer, and of the precision, so features are never
used for another model or other preprocessing. For an image tower with a linear head, the trunk's features are cached,
so that models with the same locked trunk share them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.eval.encode import ComputeOptions, Encoding, encode_images
from training.eval.image_cache import image_key
from training.model.assembly.factory import EncoderParts
from training.model.towers.locking import HEAD, apply_linear_head, linear_head
from training.model.weights.fingerprint import fingerprint, preprocessing_fingerprint, tokenizer_fingerprint
from training.runtime.distributed import DistEnv, agree
from training.runtime.files import atomic_write

FORMAT = 2  # part of the hash: after a change, old files are not used
NAME = "features.safetensors"


def text_key(text: str) -> bytes:
    """Returns the key of a caption."""
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def open_caches(
    folder: str, parts: EncoderParts, precision: str, env: DistEnv, image_decoding: str = "exact"
) -> tuple["FeatureCache", "FeatureCache"]:
    """Returns the caches of a model's image tower and text tower."""
    image = {
        "tower": fingerprint(parts.model.visual, leave_out=HEAD if linear_head(parts.model.visual) else None),
        "reads": preprocessing_fingerprint(parts.preprocess),
        "precision": precision,
        "image_decoding": image_decoding,
    }
    text = {
        "tower": fingerprint(parts.model, leave_out="visual."),
        "reads": tokenizer_fingerprint(parts.tokenizer),
        "precision": precision,
    }
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

        Args:
            keys: one key per item.
            encode: indices of items -> their encoding, complete on every rank.

        Raises:
            ValueError: the cache's file can't be read.
        """
        kept = agree(self._load, self.env)
        row_of = {bytes(row): number for number, row in enumerate(kept["key"].numpy())}
        missing = [position for position, key in enumerate(keys) if key not in row_of]
        if not missing:
            rows = torch.tensor([row_of[key] for key in keys], dtype=torch.int64)
            return Encoding(kept["features"][rows], {}, kept["lost_tokens"][rows])
        new = encode(missing)
        whole = Encoding(
            torch.zeros(len(keys), new.features.shape[1]),
            {missing[position]: reason for position, reason in new.broken.items()},
            torch.zeros(len(keys), dtype=torch.int64),
        )
        whole.features[missing], whole.lost_tokens[missing] = new.features, new.lost_tokens
        known = [position for position, key in enumerate(keys) if key in row_of]
        if known:
            rows = torch.tensor([row_of[keys[position]] for position in known])
            whole.features[known], whole.lost_tokens[known] = kept["features"][rows], kept["lost_tokens"][rows]
        good = [position for position in missing if position not in whole.broken]
        agree(lambda: self._save(kept, [keys[p] for p in good], whole, good), self.env)
        return whole

    def _load(self) -> dict[str, torch.Tensor]:
        nothing = {"features": torch.zeros(0, 0), "lost_tokens": torch.zeros(0, dtype=torch.int64)}
        nothing["key"] = torch.zeros(0, 32, dtype=torch.uint8)
        if not self.path.is_file():
            return nothing
        try:
            return load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--feature-cache: {self.path} can't be read ({error}); remove it") from error

    def _save(self, kept: dict[str, torch.Tensor], keys: list[bytes], new: Encoding, rows: list[int]) -> None:
        if not rows:
            return
        own = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
        content = {"features": new.features[rows], "lost_tokens": new.lost_tokens[rows], "key": own}
        if len(kept["key"]):
            content = {name: torch.cat([kept[name], value]) for name, value in content.items()}
        with atomic_write(self.path) as temporary:
            save_file(content, temporary)
