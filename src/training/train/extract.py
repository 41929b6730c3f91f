"""Extracts image features of a locked tower into files that training can read instead of images."""

import argparse
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from training.data.features import (
    SUFFIX,
    FeatureInfo,
    feature_info,
    is_feature_folder,
    read_index,
    read_totals,
    write_features,
    write_index,
)
from training.data.images import IN_TRAINING, ImageReader, parse_augmentation
from training.data.open import caption_rule, open_source
from training.data.reader import read_image, read_record, seed_augmentation
from training.eval.encode import run_tower
from training.model.assembly.factory import EncoderParts
from training.model.assembly.from_flags import build_from_flags, check_precision
from training.model.names.config import resolve_weights
from training.model.towers.encoders import image_encoder
from training.model.towers.locking import HEAD, linear_head
from training.model.weights.fingerprint import fingerprint
from training.readers.faults import BadSample, Totals
from training.readers.samples import BrokenShardError, Part, RawSample
from training.runtime.distributed import DistEnv, failing_with, gather_objects, on_main_rank
from training.runtime.lease import FILE, Lease
from training.runtime.tracking import log_to
from training.runtime.watchdog import BUILDING, EVALUATING, joined_ranks
from training.runtime.workers import Loader
from training.train.step_log import log_bad_sample

logger = logging.getLogger(__name__)


class ImageBatch(NamedTuple):
    """Consecutive samples of a part.

    Attributes:
        number: number of the part.
        images: pixels [max(n, 1), views, 3, H, W], later normalised features [n, views, dim] in float16.
        keys, records: keys and records of the samples.
        faults: kinds of the bad samples skipped since the last batch.
        is_last: whether this is the last batch of the part.
    """

    number: int
    images: torch.Tensor | np.ndarray
    keys: list[str]
    records: list[dict]
    faults: list[str]
    is_last: bool


class ImageBatches(IterableDataset):
    """Reads parts, each by one worker; the random augmentation of a view depends only on seed and sample.

    Args:
        parts: parts with their numbers.
        images: file -> [3, H, W].
        views: number of views of each image.
        batch_size: number of samples per batch.
        seed: seed of the augmentation.
    """

    def __init__(self, parts: list[tuple[int, Part]], images: ImageReader, views: int, batch_size: int, seed: int):
        self.parts, self.images, self.views, self.batch_size, self.seed = parts, images, views, batch_size, seed
        self.num_logged: Counter[str] = Counter()

    def __iter__(self) -> Iterator[ImageBatch]:
        info = get_worker_info()
        for number, part in self.parts[info.id :: info.num_workers] if info else self.parts:
            yield from self._read(number, part)

    def _read(self, number: int, part: Part) -> Iterator[ImageBatch]:
        rows: list[tuple] = []
        faults: list[str] = []
        num_seen = 0
        try:
            for raw in part.read():
                if len(rows) == self.batch_size:
                    yield self._batch(number, rows, faults, is_last=False)
                    rows, faults = [], []
                num_seen += 1
                try:
                    rows.append((raw.key, read_record(raw), self._views(raw)))
                except BadSample as error:
                    faults.append(error.kind)
                    log_bad_sample(error.kind, f"{raw.source}/{raw.key}", self.num_logged)
        except BrokenShardError as error:
            logger.warning(f"the readable part is used: {error}")
            faults += [error.kind] * max(1, part.size - num_seen)
        yield self._batch(number, rows, faults, is_last=True)

    def _views(self, raw: RawSample) -> torch.Tensor:
        image: Any = read_image(raw, self.images.decode)
        views = []
        for view in range(self.views):
            seed_augmentation(f"{self.seed}/view {view}/{raw.source}/{raw.key}")
            views.append(self.images.transform(image))
        return torch.stack(views)

    def _batch(self, number: int, rows: list[tuple], faults: list[str], is_last: bool) -> ImageBatch:
        keys, records, pixels = ([row[n] for row in rows] for n in range(3))
        if not rows:  # a blank image, whose features are dropped, because towers can't encode none
            pixels = [torch.stack([self.images.whole(Image.new("RGB", (8, 8)))] * self.views)]
        return ImageBatch(number, torch.stack(pixels), keys, records, faults, is_last)


def tower_info(model: Any, args: argparse.Namespace) -> FeatureInfo:
    """Describes a model's image tower and its preprocessing; a linear head, which training changes, is excluded."""
    augmentation = "strong" if args.strong_augment else " ".join(args.aug_cfg)
    return FeatureInfo(
        model=args.model,
        tower=fingerprint(model.visual, leave_out=HEAD if linear_head(model.visual) else None),
        preprocessing=json.loads(json.dumps(model.visual.preprocess_cfg)),
        views=args.feature_views,
        augmentation=augmentation if args.feature_views else "",
        precision=args.precision,
        image_decoding=args.image_decoding or IN_TRAINING,
        exif_rotation=args.exif_rotation != "off",
    )


def extract(args: argparse.Namespace) -> int:
    """Writes the features of every image in ``--train-data`` to ``--extract-image-features``.

    Existing files are kept, so an interrupted extraction continues.

    Returns:
        Exit code. 0: success; 2: wrong flags, files or weights.
    """
    with joined_ranks(args.device, args.timeout_minutes) as (env, watchdog), Lease() as lease:
        log_to(None)
        if env.is_main:
            logging.getLogger("training").setLevel(logging.INFO)
        with failing_with(2, ValueError, OSError):
            on_main_rank(lambda: _check(args, env), env)
            source: Any = open_source(args, "--train-data", args.train_data, caption_rule(args), env)
            shards = source.parts()
            watchdog.at(0, BUILDING)
            parts = build_from_flags(args, env.device)
            info = tower_info(parts.model, args)
            on_main_rank(lambda: _begin(args, shards, info, lease), env)
        watchdog.at(0, EVALUATING)
        _encode_shards(args, shards, parts, env)
        gather_objects(None, env)  # all files exist
        if env.is_main:
            totals = read_totals([str(_file_of(args, number)) for number in range(len(shards))])
            names, folder = [shard.name for shard in shards], args.extract_image_features
            write_index(Path(folder), info, names, totals.to_dict())
            how = f"--train-data {folder} --model {args.model} --lock-image"
            logger.info(f"{totals.describe()}; features: {folder}. To train on them: {how}")
    return 0


def _check(args: argparse.Namespace, env: DistEnv) -> None:
    check_precision(args.precision, env.device)
    parse_augmentation(args.aug_cfg)
    resolve_weights(args.model, args.pretrained, args.cache_dir)
    if feature_info(args.train_data):
        raise ValueError(f"--train-data {args.train_data}: contains image features; give images")


def _begin(args: argparse.Namespace, shards: list[Part], info: FeatureInfo, lease: Lease) -> None:
    """Creates the folder, or checks that it belongs to the same extraction. Rank 0 only."""
    folder, names = Path(args.extract_image_features), [shard.name for shard in shards]
    if is_feature_folder(str(folder)):
        earlier, sources, _ = read_index(folder)
        if earlier != info or sources != names:
            raise ValueError(f"--extract-image-features {folder}: contains other features; use another folder")
    elif folder.exists() and any(path.name != FILE for path in folder.iterdir()):
        raise ValueError(f"--extract-image-features {folder}: is not empty; use another folder")
    lease.take(folder, "--extract-image-features")
    write_index(folder, info, names, counts=None)


def _file_of(args: argparse.Namespace, number: int) -> Path:
    return Path(args.extract_image_features) / f"{number:06d}{SUFFIX}"


def _encode_shards(args: argparse.Namespace, shards: list[Part], parts: EncoderParts, env: DistEnv) -> None:
    """Encodes those of the shards that do not exist yet and that this rank takes."""
    todo = [(number, shard) for number, shard in enumerate(shards) if not _file_of(args, number).is_file()]
    todo = todo[env.rank :: env.world_size]
    transform = parts.train_transform if args.feature_views else parts.preprocess
    images = ImageReader(transform, args.image_decoding or IN_TRAINING, args.exif_rotation != "off")
    batches = ImageBatches(todo, images, max(1, args.feature_views), args.batch_size, args.seed)
    loader = Loader(batches, min(args.workers, len(todo)), pin=env.device.type == "cuda")
    tower = image_encoder(parts.model, without_head=True)
    names, started = {number: part.name for number, part in todo}, defaultdict(list)
    total = sum(part.size for _, part in todo)
    with tqdm(desc="extract", total=total, unit="image", delay=2, disable=not env.is_main) as bar:
        for batch in loader:
            features = run_tower(tower, batch.images.flatten(0, 1), env.device, args.precision)
            features = features.half().unflatten(0, batch.images.shape[:2]).numpy()
            started[batch.number].append(batch._replace(images=features[: len(batch.keys)]))
            bar.update(len(batch.keys))
            if batch.is_last:
                _write(_file_of(args, batch.number), names[batch.number], started.pop(batch.number))


def _write(path: Path, source: str, batches: list[ImageBatch]) -> None:
    """Writes the features of a whole part."""
    keys = [key for batch in batches for key in batch.keys]
    records = [record for batch in batches for record in batch.records]
    faults = [kind for batch in batches for kind in batch.faults]
    totals = Totals(len(keys) + len(faults), Counter(faults))
    write_features(path, source, keys, records, np.concatenate([batch.images for batch in batches]), totals)
