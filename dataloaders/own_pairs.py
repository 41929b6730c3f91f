"""A user's own pairs of images and captions in tar shards, as a training reads them.

SHARDS .tar: KEY.jpg (.jpeg, .png, .webp) with KEY.txt, or with captions in KEY.json

Captions stay as they are, unless the rule of the long benchmarks is asked for.
"""

import glob
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dataloaders.files import ShardMember
from dataloaders.own_set import CAPTION_KEYS, CAPTION_RULE, as_set, texts_of
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def read_shard_pairs(shards: str, caption_keys: Sequence[str], rule: str) -> RetrievalSet:
    """Reads pairs from local tar shards; the images stay inside and are read from there.

    Args:
        shards: files with ``{000..123}`` or ``*``, or a folder (its ``*.tar``).
        caption_keys: of ``.json``: texts or lists of texts; all that are there count. ``.txt`` is used without any.
        rule: as `read_table_pairs`.

    Raises:
        FileNotFoundError, ValueError: no such shard, a broken one, or a sample without an image or a caption.
    """
    pairs = []
    paths = _expand(shards)
    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                pairs += _read_shard(path, tar, caption_keys)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"--retrieval-wds {path}: not a readable tar file ({error})") from error
    return as_set(paths[0].parent.resolve().name, pairs, rule)


def _expand(shards: str) -> list[Path]:
    from braceexpand import braceexpand

    if "://" in shards or shards.startswith("pipe:"):
        raise ValueError(f"--retrieval-wds {shards}: expected local files; download them first")
    if Path(shards).is_dir():
        shards = str(Path(shards) / "*.tar")
    found = []
    for name in braceexpand(shards):
        matches = sorted(glob.glob(name))
        if not matches:
            raise FileNotFoundError(f"--retrieval-wds {name}: no such file")
        found += matches
    return [Path(name) for name in found]


def _read_shard(path: Path, tar: tarfile.TarFile, caption_keys: Sequence[str]) -> list[tuple[ShardMember, list[str]]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")  # as webdataset: the suffix begins at the first full stop
            samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    pairs = []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        captions = _captions_of(tar, files, caption_keys, f"--retrieval-wds {path}: sample {key.strip('/')}")
        if image is None or not captions:
            raise ValueError(
                f"--retrieval-wds {path}: sample {key.strip('/')} lacks an image or a caption (found "
                f"{', '.join(sorted(files))}; captions are looked for in .json under {', '.join(caption_keys)}, "
                f"--retrieval-caption-keys, else in .txt)"
            )
        pairs.append((ShardMember(path, image.offset_data, image.size, image.name), captions))
    return pairs


def _captions_of(tar: tarfile.TarFile, files: dict, keys: Sequence[str], where: str) -> list[str]:
    captions: list[str] = []
    try:
        if "json" in files:
            record = json.loads(tar.extractfile(files["json"]).read().decode())
            found = {key: record[key] for key in keys if key in record} if isinstance(record, dict) else {}
            captions = [text for key, value in found.items() for text in texts_of(value, f"key {key}")]
        if not captions and "txt" in files:
            captions = [tar.extractfile(files["txt"]).read().decode().strip()]
    except ValueError as error:
        raise ValueError(f"{where}: broken caption ({error})") from error
    return [text for text in captions if text]


BENCHMARKS = (
    Benchmark(
        "retrieval-wds",
        "--retrieval-wds",
        "local tar shards of pairs: '{000..004}.tar' or a folder",
        lambda args: [read_shard_pairs(args.retrieval_wds, args.retrieval_caption_keys, args.retrieval_caption_rule)],
        group="own",
        metavar="TARS",
        order=20,
        options=(CAPTION_KEYS, CAPTION_RULE),
    ),
)
