"""A user's own pairs of images and captions in tar shards, in the format of training shards.

SHARD.tar: KEY.jpg (.jpeg, .png, .webp) with KEY.txt, or with captions in KEY.json

Captions are left unchanged, unless the rule of the long benchmarks is chosen.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from dataloaders.own_set import CAPTION_KEYS, CAPTION_LINES, CAPTION_LISTS, CAPTION_RULE, as_set
from dataloaders.pairs import RetrievalSet
from dataloaders.registry import Benchmark
from training.readers.captions import caption_texts, read_record
from training.readers.files import IMAGE_SUFFIXES, ShardMember
from training.readers.tar import BrokenTarError, Member, TarReader, TarSample, expand_shards, is_local


def read_shard_pairs(
    shards: str, caption_keys: Sequence[str], rule: str, lines: bool = False, lists: str = "alternatives"
) -> RetrievalSet:
    """Reads pairs from local tar shards; the images are not extracted, but read from the shards when needed.

    Args:
        shards: files, with ``{000..123}`` or ``*``, or a folder (all its ``*.tar``).
        caption_keys: keys of the ``.json`` that hold a text or a list of texts; all that exist are read. If none does,
            the ``.txt`` is read.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        lines: each line of a ``.txt`` is a caption of its own, as in CLIP_benchmark's shards.
        lists: see `caption_texts`.

    Raises:
        FileNotFoundError, ValueError: a shard is missing or broken, or a sample lacks an image or a caption.
    """
    pairs, num_with_lines = [], 0
    for path in _local_shards(shards):
        where, num_before = f"--retrieval-wds {path}", len(pairs)
        try:
            with open(path, "rb", buffering=1 << 16) as file:
                tar = TarReader(file, str(path))
                for sample in tar.samples(lambda _, suffix, member: _text(tar, suffix, member)):
                    texts = _captions_of(sample, caption_keys, lists, lines, f"{where}: sample {sample.key}")
                    num_with_lines += not lines and any("\n" in t for t in texts if sample.loaded.get("txt"))
                    pairs.append((_image_of(sample, path, texts, caption_keys, where), texts))
        except (BrokenTarError, OSError) as error:
            raise ValueError(f"--retrieval-wds {error}") from error
        if len(pairs) == num_before:
            size = Path(path).stat().st_size
            raise ValueError(f"{where}: no sample in its {size:,} bytes; fetch it again, or leave it out")
    if num_with_lines:
        logging.warning(
            f"--retrieval-wds {shards}: {num_with_lines:,} of {len(pairs):,} .txt files have several lines; each file "
            "is one caption. If each line is a caption of its own, add --caption-lines"
        )
    path = Path(shards)
    return as_set(path.stem if path.is_file() else pairs[0][0].shard.parent.resolve().name, pairs, rule)


def _local_shards(shards: str) -> list[str]:
    if not is_local(shards):
        raise ValueError(f"--retrieval-wds {shards}: expected local files; download the shards first")
    try:
        paths = expand_shards(shards)
    except ValueError as error:
        raise ValueError(f"--retrieval-wds {error}") from error
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--retrieval-wds {path}: no such file")
    return paths


def _text(tar: TarReader, suffix: str, member: Member) -> bytes | None:
    return tar.read(member) if suffix in ("json", "txt") and member.kind == "file" else None


def _image_of(sample: TarSample, path: str, texts: list[str], keys: Sequence[str], where: str) -> ShardMember:
    """Returns the image of a sample; ValueError if an image or a caption is missing or can't be read."""
    if fault := sample.fault(("json", "txt", *IMAGE_SUFFIXES)):
        found = ", ".join(member.name for member in sample.members.values() if member.kind in ("link", "sparse"))
        raise ValueError(f"{where}: {fault}: {found}; pack the shard again with tar --hard-dereference -h, without -S")
    image = next((sample.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample.members), None)
    if image is None or not texts:
        raise ValueError(
            f"{where}: sample {sample.key} lacks an image or a caption (found {', '.join(sorted(sample.members))}; "
            f"captions are read from .json under {', '.join(keys)}, see --retrieval-caption-keys, else from .txt). The "
            "files of a sample must be next to each other in the tar: tar --sort=name"
        )
    return ShardMember(Path(path), image.offset, image.size, image.name)


def _captions_of(sample: TarSample, keys: Sequence[str], lists: str, lines: bool, where: str) -> list[str]:
    try:
        record = read_record(sample.loaded)
        found = [text for key in keys if key in record for text in caption_texts(record[key], f"key {key}", lists)]
        return found or caption_texts(record.get("txt"), "key txt", lines=lines)
    except ValueError as error:
        raise ValueError(f"{where}: broken caption ({error})") from error


BENCHMARKS = (
    Benchmark(
        "retrieval-wds",
        "--retrieval-wds",
        "local tar shards of pairs: '{000..004}.tar' or a folder",
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
