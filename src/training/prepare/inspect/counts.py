"""Counts the content of one shard, or of some rows of a table; runs in worker processes."""

import heapq
import io
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from training.data.captions import LONG_KEYS, MAX_CHARACTERS, RAW_KEYS
from training.data.reader import read_image, read_record
from training.data.sizes import expand_sources, known_sizes
from training.data.tables import embedded_sources, read_rows, read_tables
from training.model.assembly.factory import get_tokenizer
from training.model.tokenizers import count_tokens
from training.prepare.columns import SHORT_NAMES, cell_texts, open_large
from training.prepare.work import hash_text
from training.readers.captions import is_refusal
from training.readers.faults import BadSample
from training.readers.images import as_broken, load_rgb, open_image, orientation_of
from training.readers.samples import BrokenShardError, Part, RawSample, read_samples
from training.readers.table_files import local_spec, names_tables, table_files

MAX_TOKENS = 2048  # longer captions are counted with this length
BROKEN = (BrokenShardError.kind, "unreachable shard")
KNOWN_KEYS = tuple(dict.fromkeys((*RAW_KEYS, *LONG_KEYS, *SHORT_NAMES.values())))


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
    hashes: dict[str, array] = field(default_factory=lambda: {name: array("Q") for name in ("key", "url", "image")})
    picked: list[tuple] = field(default_factory=list)

    def of(self, *kind: str) -> Counter:
        """Returns the numbers of a kind by its last word: ``of("tokens", KEY)`` gives number of tokens -> captions."""
        return Counter({what[-1]: number for what, number in self.numbers.items() if what[:-1] == kind and number})

    def pick(self, samples: list[tuple], number: int) -> None:
        """Adds samples to show, of which the `number` first in order are kept."""
        self.picked = heapq.nsmallest(number, [*self.picked, *samples], key=lambda p: p[0])

    def add(self, other: "Counts", num_picked: int) -> None:
        """Adds the counts of other parts; keeps `num_picked` of the samples to show."""
        self.numbers.update(other.numbers)
        for name, values in other.hashes.items():
            self.hashes[name].extend(values)
        self.pick(other.picked, num_picked)


class Data(NamedTuple):
    """Data to count; a value that processes can be sent.

    Attributes:
        spec: shards or tables, as --train-data.
        image_column, separator: of tables.
        keys: caption keys; if empty, the known ones and all others that end in ``caption`` or ``captions``.
    """

    spec: str
    image_column: str
    separator: str | None
    keys: tuple[str, ...]

    def caption_keys(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns those of the names under which captions are counted."""
        return self.keys or tuple(n for n in names if n in KNOWN_KEYS or n.endswith(("caption", "captions")))


@cache
def open_parts(data: Data) -> tuple[list[Part], dict[str, int]]:
    """Opens data as training does.

    Returns:
        The shards, or a few rows of tables each, in order; the size is -1 if nothing counts it.
        And how many ``shards``, ``tables`` or ``folders`` of images there are.

    Raises:
        FileNotFoundError, ValueError: something is missing, or can't be opened.
    """
    spec = local_spec(data.spec)
    if inside := embedded_sources(spec, data.image_column):
        parts = [Part(url, -1, partial(read_rows, url)) for urls in inside for url in urls]
        return parts, {"tables": len(parts)}
    if names_tables(spec):
        paths = table_files(spec)
        names = dict.fromkeys(name for path in paths for name in open_large(path, data.separator).names)
        source = read_tables(paths, data.image_column, data.caption_keys(names), data.separator, 0)
        return source.parts(), {"folders" if paths[0].is_dir() else "tables": len(paths)}
    urls = [url for source in expand_sources(spec) for url in source]
    sizes = [-1 if size is None else size for size in known_sizes(urls)]
    parts = [Part(url, size, partial(read_samples, url)) for url, size in zip(urls, sizes)]
    return parts, {"shards": len(parts)}


@cache
def _tokenizer(model: str, cache_dir: str | None):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there are several processes already
    return get_tokenizer(model, cache_dir=cache_dir)


def count_part(
    number: int, data: Data, lists: str, tokenizer: tuple[str, str | None], read_images: bool, show: int, seed: int
) -> tuple[int, Counts]:
    """Counts one part.

    Args:
        number: of the part.
        data: where it is.
        lists: see `caption_texts`.
        tokenizer: the model whose tokenizer counts tokens, and the folder of its files.
        read_images: decode every image completely.
        show: maximum number of samples to show.
        seed: seed of the choice of these samples.

    Returns:
        The number of the part, and its counts.
    """
    counts = Counts()
    texts: dict[str, list[str]] = defaultdict(list)
    numbers = counts.numbers
    try:
        for sample in open_parts(data)[0][number].read():
            numbers["samples",] += 1
            try:
                record = read_record(sample)
                size, image_hash = read_image(sample, partial(_look_at, read_images))
            except BadSample as error:
                numbers["bad", error.kind] += 1
                continue
            found = {key: cell_texts(record.get(key), lists) for key in data.caption_keys(record)}
            found = {key: [text.strip() for text in captions] for key, captions in found.items() if captions}
            for key, captions in found.items():
                numbers["caption", key] += 1
                texts[key] += captions
            numbers["with", "short"] += any(key in found for key in RAW_KEYS)
            numbers["with", "long"] += any(key in found for key in LONG_KEYS)
            numbers["bad", "no caption"] += not found
            numbers.update([("width", size[0]), ("height", size[1])])
            counts.hashes["image"].append(image_hash)
            if sample.members:  # in a table, the key is the number of the row
                counts.hashes["key"].append(hash_text(sample.key))
            if isinstance(record.get("url"), str):
                counts.hashes["url"].append(hash_text(record["url"]))
            order = hash_text(f"{seed}/{sample.source}/{sample.key}")  # a pseudo-random choice
            if len(counts.picked) < show or show and order < counts.picked[-1][0]:
                counts.pick([(order, sample.source, sample.key, found, _thumbnail(sample))], show)
    except BrokenShardError as error:
        numbers["bad", error.kind] += 1
    for key, captions in texts.items():
        numbers["refused", key] = sum(map(is_refusal, captions)) if key not in RAW_KEYS else 0
        lengths = count_tokens(_tokenizer(*tokenizer), [text[:MAX_CHARACTERS] for text in captions])
        numbers.update(("tokens", key, min(int(length), MAX_TOKENS)) for length in lengths)
    return number, counts


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


def _thumbnail(sample: RawSample) -> bytes | None:
    try:
        image = read_image(sample, partial(load_rgb, upright=True))
    except BadSample:
        return None  # broken, though its header was read without an error
    image.thumbnail((224, 224))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
