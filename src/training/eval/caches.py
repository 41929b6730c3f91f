"""Features by content, so that an evaluation encodes each image and text only once: in memory, and in --feature-cache.

    DIR/TOWER/features.safetensors    features [n, dim] float32, lost_tokens [n], key [n, 32] (SHA-256 of each item)

TOWER is a hash of everything that changes a feature: the tower's weights, structure and settings, what it makes of a
fixed image or text, the reading of images or the tokenizer, and the precision. For an image tower with a linear head,
the trunk's features are cached, so that models with the same locked trunk share them.
"""

import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.data.images import ImageReader
from training.eval.encode import Encoder, Encoding, image_key, run_tower
from training.model.towers.encoders import image_encoder
from training.model.towers.locking import HEAD, apply_linear_head, linear_head
from training.model.weights.fingerprint import PROBE_TEXTS, fingerprint, probe_images, rounded
from training.runtime.distributed import on_main_rank
from training.runtime.files import atomic_write

FORMAT = 3  # part of the hash: after a change, old files are not used
NAME = "features.safetensors"
logger = logging.getLogger(__name__)
T = TypeVar("T")


class FeatureStore:
    """Encodes items whose content it has not seen yet, and returns the features of all.

    Args:
        encode: distinct items -> their encoding, complete on every rank.
    """

    def __init__(self, encode: Callable[[list], Encoding]):
        self.encode = encode
        self._row_of: dict[Hashable, int] = {}  # content -> row in the concatenation of all parts
        self._parts: list[Encoding] = []

    @property
    def contents(self) -> list[Any]:
        """What has been encoded."""
        return list(self._row_of)

    def add(self, contents: Sequence[Hashable], encoding: Encoding) -> None:
        """Adds items that are encoded already; of equal contents, the first counts."""
        first = sum(len(encoding.features) for encoding in self._parts)
        self._parts.append(encoding)
        for row, content in enumerate(contents, first):
            self._row_of.setdefault(content, row)

    def copy(self, encode: Callable[[list], Encoding] | None = None) -> "FeatureStore":
        """Returns a store of the same features; what is added to one of them does not reach the other."""
        new = FeatureStore(encode or self.encode)
        new._row_of, new._parts = dict(self._row_of), list(self._parts)
        return new

    def __call__(self, items: Sequence, contents: Sequence[Hashable] | None = None) -> Encoding:
        """Returns the encoding of all items.

        Args:
            items: captions, or image files.
            contents: items with equal contents have equal features; default: the items themselves.
        """
        contents = items if contents is None else contents
        new = {content: item for content, item in zip(contents, items) if content not in self._row_of}
        if new:
            self.add(list(new), self.encode(list(new.values())))
        if len(new) == len(items) > 0:
            return self._parts[-1]  # the usual case: there is only one copy of a benchmark's features
        return self._gather(torch.tensor([self._row_of[content] for content in contents], dtype=torch.int64))

    def _gather(self, rows: torch.Tensor) -> Encoding:
        dim = self._parts[0].features.shape[1] if self._parts else 0
        found = Encoding(torch.empty(len(rows), dim), {}, torch.zeros(len(rows), dtype=torch.int64))
        first = 0
        for encoding in self._parts:
            items = ((rows >= first) & (rows < first + len(encoding.features))).nonzero()[:, 0]
            chosen = rows[items] - first
            found.features[items], found.lost_tokens[items] = encoding.features[chosen], encoding.lost_tokens[chosen]
            if encoding.broken:
                pairs = zip(items.tolist(), chosen.tolist())
                found.broken.update((item, encoding.broken[row]) for item, row in pairs if row in encoding.broken)
            first += len(encoding.features)
        return found


def text_key(text: str) -> bytes:
    """Returns the key of a caption."""
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def describe_image_tower(encoder: Encoder, cut_head: bool = False) -> dict[str, object]:
    """Returns everything that changes an image's features, as values for JSON; the features of a probe are among it.

    Args:
        encoder: the model and how it reads images.
        cut_head: the features are those before the tower's `linear_head`.
    """
    visual: Any = encoder.parts.model.visual
    decoding = encoder.options.image_decoding
    pixels = [ImageReader(encoder.parts.preprocess, decoding)(file) for file in probe_images()]
    hashed = sha256(torch.cat([p.flatten() for p in pixels]).numpy().tobytes()).hexdigest()
    described = _describe(encoder, image_encoder(encoder.parts.model, cut_head), pixels[0][None])
    described["tower"] = fingerprint(visual, leave_out=HEAD if cut_head and linear_head(visual) else None)
    return described | {"pixels": hashed, "image_decoding": decoding}


def describe_text_tower(encoder: Encoder) -> dict[str, object]:
    """Does for texts what `describe_image_tower` does for images."""
    model: Any = encoder.parts.model
    ids = encoder.parts.tokenizer(list(PROBE_TEXTS))
    hashed = sha256(f"{tuple(ids.shape)} {ids.tolist()}".encode()).hexdigest()
    return _describe(encoder, model.encode_text, ids) | {"tower": fingerprint(model, "visual."), "tokenizer": hashed}


def _describe(encoder: Encoder, tower: Callable, probe: torch.Tensor) -> dict[str, object]:
    precision = encoder.options.precision
    return {"precision": precision, "probe": rounded(run_tower(tower, probe, encoder.env.device, precision))}


def open_caches(encoder: Encoder) -> tuple["FeatureCache", "FeatureCache"]:
    """Returns the caches of a model's image tower and text tower."""
    if not encoder.options.feature_cache:
        return FeatureCache(encoder), FeatureCache(encoder)
    image, text = describe_image_tower(encoder, cut_head=True), describe_text_tower(encoder)
    return FeatureCache(encoder, image), FeatureCache(encoder, text)


def encode_images_once(cache: "FeatureCache", encoder: Encoder, paths: Sequence[Path]) -> Encoding:
    """Does what `Encoder.images` does, with the image tower's cache, which holds features before the linear head."""
    if cache.path is None:
        return encoder.images(paths)
    visual: Any = encoder.parts.model.visual
    found = cache.encode(paths, image_key, partial(encoder.images, without_head=True))
    return replace(found, features=apply_linear_head(visual, found.features))


class FeatureCache:
    """Cache of one tower's features.

    Args:
        encoder: its options name the folder; without one, nothing is cached. Rank 0 reads and writes the file.
        tower: everything that features depend on except the item, as values for JSON.

    Attributes:
        path: the file; None without a folder.
    """

    def __init__(self, encoder: Encoder, tower: dict | None = None):
        self.env = encoder.env
        self.path: Path | None = None
        if encoder.options.feature_cache:
            described = json.dumps({"format": FORMAT, **(tower or {})}, sort_keys=True)
            folder = sha256(described.encode()).hexdigest()[:32]
            self.path = Path(encoder.options.feature_cache) / folder / NAME

    def encode(
        self, items: Sequence[T], key_of: Callable[[T], bytes], encode: Callable[[Sequence[T]], Encoding]
    ) -> Encoding:
        """Returns the features of all items; encodes and adds those that are not in the cache.

        A file that can't be read or written costs a warning: its features are encoded again, or not kept.

        Args:
            items: image files, texts, or the texts of classes.
            key_of: key of an item in the cache.
            encode: items -> their encoding, complete on every rank.
        """
        path = self.path
        if path is None:
            return encode(items)
        store = FeatureStore(encode)
        if content := on_main_rank(lambda: _load(path), self.env):
            known = Encoding(content["features"], {}, content["lost_tokens"])
            store.add([row.tobytes() for row in content["key"].numpy()], known)
        num_known, keys = len(store.contents), list(map(key_of, items))
        found = store(items, keys)
        if len(store.contents) > num_known:
            broken = {keys[number] for number in found.broken}
            on_main_rank(lambda: _save(path, store, [key for key in store.contents if key not in broken]), self.env)
        return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.exists():
            content = load_file(path)
            return {name: content[name] for name in ("features", "lost_tokens", "key")}
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning(f"--feature-cache: {path} can't be read ({error}); its features are encoded again")
    return {}


def _save(path: Path, store: FeatureStore, keys: list[bytes]) -> None:
    known = store(keys, keys)
    key = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32).copy()
    content = {"features": known.features, "lost_tokens": known.lost_tokens, "key": torch.from_numpy(key)}
    try:
        with atomic_write(path) as temporary:
            save_file(content, temporary)
    except (SafetensorError, OSError) as error:
        logger.warning(f"--feature-cache: {path} can't be written ({error}); its features are not kept")
