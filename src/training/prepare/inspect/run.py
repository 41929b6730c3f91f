"""`prepare inspect`: counts the content of a shard set, with the tokenizer that training will use.

Processes count shards, and their counts are added up. The result depends neither on the number of processes nor on the
order.
"""

import argparse
import heapq
import io
import os
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from training.data.captions import LONG_KEYS, MAX_CHARACTERS, RAW_KEYS
from training.data.faults import BadSample
from training.data.reader import read_image, read_record
from training.data.sizes import expand_sources, known_sizes
from training.model.assembly.factory import get_tokenizer
from training.model.tokenizers.truncation import count_tokens
from training.prepare.inspect.counts import MAX_TOKENS, Counts
from training.prepare.inspect.report import describe, summarise, write_html, write_png
from training.prepare.tables.chunk import url_hash
from training.prepare.tables.columns import SHORT_NAMES
from training.prepare.tables.records import cell_text
from training.prepare.work import my_share, processes, progress, spread, write_json
from training.readers.images import (
    as_broken,
    load_rgb,
    open_image,
    orientation_of,
)
from training.readers.samples import BrokenShardError, RawSample, read_samples
from training.readers.sentences import is_refusal

KNOWN_KEYS = tuple(dict.fromkeys((*RAW_KEYS, *LONG_KEYS, *SHORT_NAMES.values())))


@dataclass(frozen=True)
class Task:
    """One shard to count.

    Attributes:
        url: the shard.
        model: the model whose tokenizer counts tokens.
        cache_dir: folder of the tokenizer's files.
        num_picked: maximum number of samples to show.
        seed: seed of the choice of these samples.
        keys: caption keys; if empty, the known ones and all others that end in ``caption`` or ``captions``.
        read_images: decode every image completely.
    """

    url: str
    model: str
    cache_dir: str | None
    num_picked: int
    seed: int
    keys: tuple[str, ...]
    read_images: bool


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read to their end."""
    urls = [url for source in expand_sources(args.shards) for url in source]
    urls = my_share(urls, args.shard_range, {})
    tokenizer = get_tokenizer(args.model, cache_dir=args.cache_dir)
    lengths = sorted({*args.context_lengths, tokenizer.context_length})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(url, args.model, args.cache_dir, args.show, args.seed, args.caption_keys or (), args.read_images)
        for url in urls
    ]
    total, by_shard = Counts(), {}
    with processes(args.workers) as pool:
        for url, counts in progress(spread(_count_shard, tasks, pool), len(tasks), "counting", "shard"):
            total.add(counts, args.show)
            by_shard[url] = counts.samples, sum(counts.bad[kind] for kind in ("broken shard", "unreachable shard"))
    broken = [url for url in urls if by_shard[url][1]]
    said = {url: size for url, size in zip(urls, known_sizes(urls)) if size not in (None, by_shard[url][0])}
    report = {"shards": len(urls), "broken_shards": broken} | summarise(total, lengths)
    report["miscounted"] = {url: {"sizes.json": size, "samples": by_shard[url][0]} for url, size in said.items()}
    report |= {"model": args.model, "context_length": tokenizer.context_length}
    write_json(out / "inspect.json", report)
    write_png(out / "inspect.png", total, lengths)
    write_html(out / "samples.html", total.picked, args.shards)
    print(describe(report))
    print(f"{out}: inspect.json, inspect.png, samples.html ({len(total.picked)} samples)")
    return 1 if broken else 0


@cache
def _tokenizer(model: str, cache_dir: str | None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are several processes already
    return get_tokenizer(model, cache_dir=cache_dir)


def _count_shard(task: Task) -> tuple[str, Counts]:
    counts = Counts()
    texts: dict[str, list[str]] = {}
    hashes: dict[str, list[int]] = {"key": [], "url": [], "image": []}
    try:
        for sample in read_samples(task.url):
            counts.samples += 1
            try:
                record, image = _look_at(sample, task)
            except BadSample as error:
                counts.bad[str(error)] += 1
                continue
            found = _captions(record, task.keys)
            for key, text in found.items():
                texts.setdefault(key, []).append(text)
            counts.with_short += any(key in found for key in RAW_KEYS)
            counts.with_long += any(key in found for key in LONG_KEYS)
            if not found:
                counts.bad["no caption"] += 1
            _note(counts, hashes, sample, record, image)
            _pick(counts, sample, found, task)
    except BrokenShardError as error:
        counts.bad[error.kind] += 1
    tokenizer = _tokenizer(task.model, task.cache_dir)
    for key, those in texts.items():
        counts.captions[key] = len(those)
        counts.refused[key] = sum(map(is_refusal, those)) if key not in RAW_KEYS else 0
        numbers = count_tokens(tokenizer, [text[:MAX_CHARACTERS] for text in those])
        counts.lengths[key] = np.bincount(np.minimum(numbers, MAX_TOKENS), minlength=MAX_TOKENS + 1)
    counts.hashes = {name: [np.array(values, dtype=np.uint64)] for name, values in hashes.items()}
    return task.url, counts


def _look_at(sample: RawSample, task: Task) -> tuple[dict, tuple[int, int]]:
    """Returns (record, image size); raises BadSample with training's kinds of fault."""
    record = read_record(sample)
    return record, read_image(
        sample, _size_of if not task.read_images else lambda image: load_rgb(image, upright=True).size
    )


def _size_of(content: bytes) -> tuple[int, int]:
    """Returns the size in an image's header; raises `load_rgb`'s errors, as far as the header shows them."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.size if orientation_of(image) < 5 else image.size[::-1]
    except Exception as error:
        raise as_broken(error, content) from error


def _captions(record: dict, keys: tuple[str, ...]) -> dict[str, str]:
    wanted = keys or [k for k in record if k in KNOWN_KEYS or k.endswith(("caption", "captions"))]
    texts = {key: (cell_text(record.get(key), "sentences") or "").strip() for key in wanted}
    return {key: text for key, text in texts.items() if text}


def _note(counts: Counts, hashes: dict[str, list[int]], sample: RawSample, record: dict, size: tuple[int, int]) -> None:
    counts.widths[size[0]] += 1
    counts.heights[size[1]] += 1
    hashes["key"].append(url_hash(sample.key))
    if isinstance(record.get("url"), str):
        hashes["url"].append(url_hash(record["url"]))
    hashes["image"].append(int.from_bytes(blake2b(sample.image, digest_size=8).digest(), "big"))


def _pick(counts: Counts, sample: RawSample, found: dict[str, str], task: Task) -> None:
    """Keeps the samples whose names come first in a pseudo-random order that depends on the seed."""
    order = url_hash(f"{task.seed}/{sample.source}/{sample.key}")
    if len(counts.picked) == task.num_picked and (not task.num_picked or order >= counts.picked[-1][0]):
        return
    counts.picked.append((order, sample.source, sample.key, found, _thumbnail(sample)))
    counts.picked = heapq.nsmallest(task.num_picked, counts.picked, key=lambda p: p[0])


def _thumbnail(sample: RawSample) -> bytes | None:
    try:
        image = read_image(sample, partial(load_rgb, upright=True))
    except BadSample:
        return None  # broken, though its header was read without an error
    image.thumbnail((224, 224))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
