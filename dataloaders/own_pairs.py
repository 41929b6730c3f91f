"""A user's own pairs of images and captions in tar shards, in the format of training shards.

SHARD.tar: KEY.jpg (or another suffix of `IMAGE_SUFFIXES`) with KEY.txt, or with captions in KEY.json

Captions are left unchanged, unless the rule of the long benchmarks is chosen.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dataloaders.own_set import CAPTION_KEYS, CAPTION_LINES, CAPTION_LISTS, CAPTION_RULE, as_set, present_keys
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark
from training.readers.captions import caption_texts, read_record
from training.readers.files import ShardMember
from training.readers.samples import BrokenShardError, RawSample, read_samples
from training.readers.streams import expand_shards, is_local, local_copy
from training.readers.tar import TEXT_SUFFIXES


def read_shard_pairs(
    shards: str, caption_keys: Sequence[str], rule: str, lines: bool = False, lists: str = "alternatives"
) -> RetrievalSet:
    """Reads pairs from tar shards; images are read from the shards when needed.

    Args:
        shards: see `expand_shards`; several are separated by ``::``. The output of a ``pipe:`` and compressed shards
            are unpacked to temporary files.
        caption_keys: keys of the ``.json`` that hold a text or a list of texts; all that exist are read. If none does,
            the ``.txt`` is read.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        lines: each line of a ``.txt`` is a caption of its own, as in CLIP_benchmark's shards.
        lists: see `caption_texts`.

    Raises:
        FileNotFoundError, ValueError: a shard is missing or broken, or a sample lacks an image or a caption.
    """
    pairs, num_with_lines = [], 0
    try:
        urls = [url for part in shards.split("::") for url in expand_shards(part)]
        for url in urls:
            if is_local(url) and not os.path.exists(url):
                raise FileNotFoundError(f"{url}: no such file")
            num_before, path = len(pairs), local_copy(url)
            for raw in read_samples(path, load=TEXT_SUFFIXES):
                texts = _captions_of(raw, caption_keys, lists, lines, url)
                num_with_lines += not lines and any("\n" in t for t in texts if raw.files.get("txt"))
                pairs.append((_image_of(raw, path, texts, caption_keys, url), texts))
            if len(pairs) == num_before:
                held = f"its {os.path.getsize(path):,} bytes" if is_local(path) else "it"
                raise ValueError(f"{url}: no sample in {held}; fetch it again, or leave it out")
    except (BrokenShardError, FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--retrieval-wds {error}") from error
    if num_with_lines:
        logging.warning(
            f"--retrieval-wds {shards}: {num_with_lines:,} of {len(pairs):,} .txt files have several lines; each file "
            "is one caption. If each line is a caption of its own, add --caption-lines"
        )
    return as_set(_name(shards, urls), pairs, rule)


def _name(shards: str, urls: Sequence[str]) -> str:
    """Returns the name of the set: the name of a single file, or of the folder that holds several."""
    if urls == [shards]:
        return Path(shards.split()[-2 if shards.endswith(" -") else -1]).name.split(".tar")[0]
    return Path(urls[0]).parent.name if not is_local(urls[0]) else Path(urls[0]).parent.resolve().name


def _image_of(raw: RawSample, path: str, texts: list[str], keys: Sequence[str], url: str) -> ShardMember:
    """Returns the image of a sample; ValueError if an image or a caption is missing or can't be read."""
    members = raw.members.members
    if raw.fault:
        found = ", ".join(m.name for m in members.values() if m.kind in ("link", "sparse")) or raw.key
        raise ValueError(f"{url}: {raw.fault}: {found}; pack it again: tar --hard-dereference -h, without -S")
    image = raw.members.image
    if image is None or not texts:
        raise ValueError(
            f"{url}: sample {raw.key} lacks an image or a caption (found {', '.join(sorted(members))}; captions are "
            f"read from .json under {', '.join(keys)}, see --retrieval-caption-keys, else from .txt). The files of a "
            "sample must be next to each other in the tar: tar --sort=name"
        )
    return ShardMember(Path(path) if is_local(path) else path, image.offset, image.size, image.name)


def _captions_of(raw: RawSample, keys: Sequence[str], lists: str, lines: bool, url: str) -> list[str]:
    try:
        record = read_record(raw.files)
        found = present_keys(keys, record) or ["txt"]
        return [
            text
            for key in found
            for text in caption_texts(record.get(key), f"key {key}", lists, lines and key == "txt")
        ]
    except ValueError as error:
        raise ValueError(f"{url}: sample {raw.key}: broken caption ({error})") from error


BENCHMARKS = (
    Benchmark(
        "retrieval-wds",
        "--retrieval-wds",
        "tar shards of pairs: '{000..004}.tar', a folder, URLs",
        lambda args: [
            read_shard_pairs(
                args.retrieval_wds,
                args.retrieval_caption_keys,
                args.retrieval_caption_rule,
                args.caption_lines,
                args.caption_lists,
            )
        ],
        group="own",
        metavar="TARS",
        order=20,
        options=(CAPTION_KEYS, CAPTION_RULE, CAPTION_LISTS, CAPTION_LINES),
    ),
)
