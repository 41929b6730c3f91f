"""A user's own pairs of images and captions in tar shards, in the format of training shards.

SHARD.tar: KEY.jpg (or another suffix of `IMAGE_SUFFIXES`) with KEY.txt, or with captions in KEY.json

Captions are left unchanged, unless the rule of the long benchmarks is chosen.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dataloaders.pairs import RetrievalSet, several_captions_per_image
from dataloaders.registry import Benchmark, Option
from dataloaders.values import names
from training.readers.captions import caption_texts, is_unicode, normalise_caption, read_record
from training.readers.files import IMAGE_SUFFIXES, ShardMember, naming
from training.readers.samples import OF_ONE_SAMPLE, SEVERAL_LINES, TEXT_SUFFIXES, RawSample, read_samples
from training.readers.streams import expand_shards, is_local, local_copy

CAPTION_KEYS = Option(
    "--retrieval-caption-keys",
    "where the captions are: columns of the table, or keys in a shard's .json; all that exist are read (default: the "
    "first of caption, raw_caption, txt, title, text, long_caption, conversations)",
    metavar="KEYS",
    default=("caption", "raw_caption", "txt", "title", "text", "long_caption", "conversations"),
    type=names,
    aliases=("--caption-keys",),
)
CAPTION_RULE = Option(
    "--retrieval-caption-rule",
    "raw: captions unchanged; long: split and joined as in the long benchmarks (default: %(default)s)",
    default="raw",
    choices=("raw", "long"),
)
CAPTION_OPTIONS = (CAPTION_KEYS, CAPTION_RULE)


def captions_of(record: Mapping, keys: Sequence[str], lists: str, lines: bool, where: str) -> list[str]:
    """Returns the captions of a sample or row under some keys, without empty ones; of the default keys, those under the
    first that has any.

    Args:
        record: key or column -> value.
        keys: the keys or columns.
        lists: see `caption_texts`.
        lines: each line of a ``txt`` is a caption of its own.
        where: what the message of an error begins with.

    Raises:
        ValueError: a value is no text, list of texts or conversation, or not Unicode.
    """
    found = []
    for key in keys:
        texts = caption_texts(record.get(key), f"{where}, {key}", lists, lines and key == "txt")
        if not all(map(is_unicode, texts)):
            raise ValueError(f"{where}, {key}: half a surrogate pair, expected text that can be written as UTF-8")
        found += texts
        if texts and keys == CAPTION_KEYS.default:
            break
    return found


def set_name(spec: str, files: Sequence[str | Path]) -> str:
    """Returns the name of a set: that of a file, or of the folder or hub data set if it is that or a pattern."""
    if spec.startswith("hf:"):
        return spec.removeprefix("hf:").rstrip("/").rsplit("/", 1)[-1].split(":")[0]
    if os.path.isdir(spec):
        return Path(spec).resolve().name
    first = str(files[0])
    is_pattern = any(mark in spec for mark in "*?{") and not spec.startswith("pipe:") and not os.path.isfile(spec)
    if len(files) > 1 or is_pattern:
        return Path(first).resolve().parent.name
    file = os.path.basename(first.removesuffix(" -").split()[-1] if first.startswith("pipe:") else first)
    return file.split(".tar")[0] if ".tar" in file else os.path.splitext(file)[0]


def as_set(name: str, pairs: Iterable[tuple], rule: str) -> RetrievalSet:
    """Builds a retrieval set from a user's own pairs.

    Args:
        name: name of the set; the keys of its results begin with ``NAME-retrieval``.
        pairs: (image, its captions) for each image.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
    """
    apply = normalise_caption if rule == "long" else str
    pairs = [(image, [apply(text) for text in captions]) for image, captions in pairs]
    return several_captions_per_image(f"{name}-retrieval", name, pairs, source="your own pairs")


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
    with naming("--retrieval-wds"):
        urls = [url for name in shards.split("::") for url in expand_shards(name)]
        for url in urls:
            if is_local(url) and not os.path.exists(url):
                raise FileNotFoundError(f"{url}: no such file")
            num_before, path = len(pairs), local_copy(url)
            for raw in read_samples(path, load=TEXT_SUFFIXES):
                try:
                    record = read_record(raw.files)
                    keys = caption_keys if any(key in record for key in caption_keys) else ("txt",)
                    texts = captions_of(record, keys, lists, lines, "key")
                except ValueError as error:
                    raise ValueError(f"{url}: sample {raw.key}: broken caption ({error})") from error
                num_with_lines += not lines and "txt" in raw.files and any("\n" in text for text in texts)
                pairs.append((_image_of(raw, path, texts, caption_keys, url), texts))
            if len(pairs) == num_before:
                size = f"its {os.path.getsize(path):,} bytes" if is_local(path) else "it"
                raise ValueError(f"{url}: no sample in {size}; fetch it again, or leave it out")
    if num_with_lines:
        logging.warning(f"--retrieval-wds {shards}: {num_with_lines:,} of {len(pairs):,} samples have {SEVERAL_LINES}")
    return as_set(set_name(shards, urls), pairs, rule)


def _image_of(raw: RawSample, path: str, texts: list[str], keys: Sequence[str], url: str) -> ShardMember:
    """Returns the image of a sample; ValueError if an image or a caption is missing or can't be read."""
    if raw.fault:
        found = ", ".join(m.name for m in raw.members.values() if m.kind in ("link", "sparse")) or raw.key
        raise ValueError(f"{url}: {raw.fault}: {found}; pack it again: tar --hard-dereference -h, without -S")
    image = next((raw.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw.members), None)
    if image is None or not texts:
        raise ValueError(
            f"{url}: sample {raw.key} lacks an image or a caption (found {', '.join(sorted(raw.members))}; captions "
            f"are read from .json under {', '.join(keys)} (--retrieval-caption-keys), else .txt); {OF_ONE_SAMPLE}"
        )
    return ShardMember(Path(path) if is_local(path) else path, image.offset, image.size, image.name)


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
        options=CAPTION_OPTIONS,
    ),
)
