"""Counts the content of one shard, or of some rows of a table; runs in worker processes."""

import heapq
import io
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data.captions import LONG_KEYS, MAX_CHARACTERS, RAW_KEYS
from training.data.embedded import embedded_sources, read_rows
from training.data.reader import read_image, read_record
from training.data.sizes import expand_sources, known_sizes
from training.data.tables import read_tables
from training.model.assembly.factory import get_tokenizer
from training.model.tokenizers.truncation import count_tokens
from training.prepare.rows import TableRows, cell_texts
from training.prepare.tables.columns import SHORT_NAMES
from training.prepare.work import hash_text
from training.readers.faults import BadSample
from training.readers.hub import local_spec
from training.readers.images import as_broken, load_rgb, open_image, orientation_of
from training.readers.samples import BrokenShardError, Part, RawSample, read_samples
from training.readers.sentences import is_refusal
from training.readers.table_files import names_tables, table_files

MAX_TOKENS = 2048  # longer captions are counted with this length
BROKEN = (BrokenShardError.kind, "unreachable shard")
KNOWN_KEYS = tuple(dict.fromkeys((*RAW_KEYS, *LONG_KEYS, *SHORT_NAMES.values())))


class Options(NamedTuple):
    """What to count, and how; a value that processes can be sent.

    Attributes:
        spec: shards or tables, as --train-data.
        image_column, separator: of tables.
        keys: caption keys; if empty, the known ones and all others that end in ``caption`` or ``captions``.
        lists: see `caption_texts`.
        model: the model whose tokenizer counts tokens.
        cache_dir: folder of the tokenizer's files.
        num_picked: maximum number of samples to show.
        seed: seed of the choice of these samples.
        read_images: decode every image completely.
    """

    spec: str
    image_column: str
    separator: str | None
    keys: tuple[str, ...]
    lists: str
    model: str
    cache_dir: str | None
    num_picked: int
    seed: int
    read_images: bool

    def caption_keys(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns those of the names under which captions are counted."""
        return self.keys or tuple(n for n in names if n in KNOWN_KEYS or n.endswith(("caption", "captions")))


@dataclass
class Counts:
    """Counts of one or several parts.

    Attributes:
        numbers: what is counted -> number: ``("samples",)``, ``("bad", KIND)``, ``("with", "short" or "long")`` by
            training's default keys, and for each caption key ``("caption", KEY)`` samples, ``("refused", KEY)``
            captions, ``("tokens", KEY, NUMBER)`` captions, ``("width" or "height", PIXELS)`` images.
        hashes: ``key``, ``url``, ``image`` -> 64-bit hashes of these.
        picked: samples to show, as (order, shard, key, captions, image).
    """

    numbers: Counter = field(default_factory=Counter)
    hashes: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"key": [], "url": [], "image": []})
    picked: list[tuple] = field(default_factory=list)

    def of(self, *kind: str) -> Counter:
        """Returns the numbers of a kind by its last word: ``of("tokens", KEY)`` gives number of tokens -> captions."""
        return Counter({what[-1]: number for what, number in self.numbers.items() if what[:-1] == kind})

    def add(self, other: "Counts", num_picked: int) -> None:
        """Adds the counts of other parts; keeps `num_picked` of the samples to show."""
        self.numbers.update(other.numbers)
        for name, arrays in other.hashes.items():
            self.hashes[name] += arrays
        self.picked = heapq.nsmallest(num_picked, [*self.picked, *other.picked], key=lambda p: p[0])


@cache
def open_parts(options: Options) -> list[Part]:
    """Returns the parts of the data in order, as training opens them: shards, or rows of tables.

    The size of a shard is None unless ``sizes.json`` counts it.

    Raises:
        FileNotFoundError, ValueError: something is missing, or can't be opened.
    """
    spec = local_spec(options.spec)
    if inside := embedded_sources(spec, options.image_column):
        return [Part(url, None, partial(read_rows, url)) for urls in inside for url in urls]
    if names_tables(spec):
        paths = table_files(spec)
        names = dict.fromkeys(name for path in paths for name in TableRows(path, options.separator).names)
        return read_tables(paths, options.image_column, options.caption_keys(names), options.separator, 0).parts()
    urls = [url for source in expand_sources(spec) for url in source]
    return [Part(url, size, partial(read_samples, url)) for url, size in zip(urls, known_sizes(urls))]


@cache
def _tokenizer(model: str, cache_dir: str | None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are several processes already
    return get_tokenizer(model, cache_dir=cache_dir)


def count_part(job: tuple[Options, int]) -> tuple[int, Counts]:
    """Counts one part; the argument and result are (options, number of the part) and (that number, its counts)."""
    options, number = job
    counts, numbers, texts = Counts(), Counter(), {}
    hashes: dict[str, list[int]] = {name: [] for name in counts.hashes}
    try:
        for sample in open_parts(options)[number].read():
            numbers["samples",] += 1
            try:
                record = read_record(sample)
                size, image_hash = read_image(sample, partial(_look_at, options.read_images))
            except BadSample as error:
                numbers["bad", error.kind] += 1
                continue
            found = _captions(record, options)
            for key, captions in found.items():
                numbers["caption", key] += 1
                texts.setdefault(key, []).extend(captions)
            numbers["with", "short"] += any(key in found for key in RAW_KEYS)
            numbers["with", "long"] += any(key in found for key in LONG_KEYS)
            numbers["bad", "no caption"] += not found
            numbers["width", size[0]] += 1
            numbers["height", size[1]] += 1
            hashes["image"].append(image_hash)
            if sample.members:  # in a table, the key is the number of the row
                hashes["key"].append(hash_text(sample.key))
            if isinstance(record.get("url"), str):
                hashes["url"].append(hash_text(record["url"]))
            _pick(counts, sample, found, options)
    except BrokenShardError as error:
        numbers["bad", error.kind] += 1
    for key, captions in texts.items():
        numbers["refused", key] = sum(map(is_refusal, captions)) if key not in RAW_KEYS else 0
        tokenizer = _tokenizer(options.model, options.cache_dir)
        lengths = count_tokens(tokenizer, [text[:MAX_CHARACTERS] for text in captions])
        numbers.update(("tokens", key, min(int(length), MAX_TOKENS)) for length in lengths)
    counts.numbers = +numbers
    counts.hashes = {name: [np.array(values, dtype=np.uint64)] for name, values in hashes.items()}
    return number, counts


def _captions(record: dict, options: Options) -> dict[str, list[str]]:
    texts = {
        key: [t.strip() for t in cell_texts(record.get(key), options.lists)] for key in options.caption_keys(record)
    }
    return {key: captions for key, captions in texts.items() if captions}


def _look_at(completely: bool, source: bytes | str) -> tuple[tuple[int, int], int]:
    """Returns (width and height, hash of the file); raises `load_rgb`'s errors, or those that the header shows."""
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        image_hash = int.from_bytes(blake2b(content, digest_size=8).digest(), "big")
        if completely:
            return load_rgb(content, upright=True).size, image_hash
        with open_image(io.BytesIO(content)) as image:
            return image.size if orientation_of(image) < 5 else image.size[::-1], image_hash
    except Exception as error:
        raise as_broken(error, source) from error


def _pick(counts: Counts, sample: RawSample, found: dict[str, list[str]], options: Options) -> None:
    """Keeps the samples whose names come first in a pseudo-random order that depends on the seed."""
    order = hash_text(f"{options.seed}/{sample.source}/{sample.key}")
    if len(counts.picked) < options.num_picked or options.num_picked and order < counts.picked[-1][0]:
        picked = [*counts.picked, (order, sample.source, sample.key, found, _thumbnail(sample))]
        counts.picked = heapq.nsmallest(options.num_picked, picked, key=lambda p: p[0])


def _thumbnail(sample: RawSample) -> bytes | None:
    try:
        image = read_image(sample, partial(load_rgb, upright=True))
    except BadSample:
        return None  # broken, though its header was read without an error
    image.thumbnail((224, 224))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
