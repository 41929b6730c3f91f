"""`prepare inspect`: counts the content of shards or tables, with the tokenizer that training will use.

Processes count one part each, and their counts are added up. The result depends neither on the number of processes nor
on the order. It is shown as a table and as JSON, and samples of it as a page.
"""

import argparse
import base64
import heapq
import io
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from training.data.captions import LONG_KEYS, MAX_CHARACTERS, RAW_KEYS
from training.data.reader import read_image, read_record
from training.data.sizes import expand_sources, known_sizes
from training.data.tables import embedded_sources, read_rows, read_tables
from training.model.assembly.factory import get_tokenizer
from training.model.tokenizers import count_tokens
from training.prepare.columns import SHORT_NAMES, cell_texts, open_large
from training.prepare.work import format_counts, hash_text, items_of_job, processes, write_json
from training.readers.captions import is_refusal
from training.readers.faults import BadSample
from training.readers.images import as_broken, load_rgb, open_image, orientation_of
from training.readers.samples import BrokenShardError, Part, RawSample, read_samples
from training.readers.table_files import local_spec, names_tables, table_files
from training.runtime.files import atomic_write
from training.runtime.messages import render_page

QUANTILES = (0.05, 0.5, 0.95)
MAX_TOKENS = 2048  # longer captions are counted with this length
BROKEN = (BrokenShardError.kind, "unreachable shard")
KNOWN_KEYS = tuple(dict.fromkeys((*RAW_KEYS, *LONG_KEYS, *SHORT_NAMES.values())))


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read to their end."""
    data = Data(args.shards, args.csv_img_key, args.csv_separator, args.caption_keys or ())
    parts, places = open_parts(data)
    chosen = items_of_job(range(len(parts)), args.shard_range, {})
    tokenizer: Any = get_tokenizer(args.model, cache_dir=args.cache_dir)
    lengths = sorted({*args.context_lengths, tokenizer.context_length})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    total, broken, miscounted = Counts(), [], {}
    rules = {"lists": args.caption_lists, "tokenizer": (args.model, args.cache_dir), "read_images": args.read_images}
    count = partial(count_part, data=data, **rules, show=args.show, seed=args.seed)
    with processes(args.workers) as parallel:
        for number, counts in parallel(count, chosen, len(chosen), "counting", "part"):
            total.add(counts, args.show)
            name, size, found = parts[number].name, parts[number].size, counts.numbers["samples",]
            if any(counts.numbers["bad", kind] for kind in BROKEN):
                broken.append(name)
            if size not in (-1, found):
                miscounted[name] = {"sizes.json": size, "samples": found}
    if args.shard_range:  # numbers of shards, or of parts of tables
        places = {kind: min(number, len(chosen)) for kind, number in places.items()}
    report = places | {"broken_shards": sorted(broken)} | summarise(total, lengths)
    report |= {"miscounted": dict(sorted(miscounted.items())), "model": args.model}
    write_json(out / "inspect.json", report | {"context_length": tokenizer.context_length})
    write_html(out / "samples.html", total.picked, args.shards)
    print(f"{describe(report)}\n{out}: inspect.json, samples.html ({len(total.picked)} samples)")
    return 1 if broken else 0


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


def summarise(counts: Counts, context_lengths: list[int]) -> dict:
    """Returns the content of inspect.json, except for lists of shards.

    Args:
        counts: counts of the whole set.
        context_lengths: context lengths, for each of which the fraction of longer captions is computed.
    """
    captions, bad = {}, counts.of("bad")
    for key, samples in sorted(counts.of("caption").items(), key=lambda item: (-item[1], item[0])):
        tokens = counts.of("tokens", key)
        number = tokens.total()
        longer = {str(n): sum(c for length, c in tokens.items() if length > n) for n in context_lengths}
        captions[key] = {
            "samples": samples,
            "captions": number,
            "refused": counts.numbers["refused", key],
            "mean_tokens": round(sum(length * c for length, c in tokens.items()) / number, 2),
            "token_quantiles": _quantiles(tokens, (*QUANTILES, 1.0)),
            "truncated_share": {n: round(count / number, 6) for n, count in longer.items()},
            "token_histogram": {str(length): tokens[length] for length in sorted(tokens)},
        }
    num_samples = counts.numbers["samples",]
    return {
        "samples": num_samples,
        "usable": num_samples - sum(number for kind, number in bad.items() if kind not in BROKEN),
        "bad": dict(sorted(bad.items())),
        "with_short_caption": counts.numbers["with", "short"],
        "with_long_caption": counts.numbers["with", "long"],
        "captions": captions,
        "longest_counted": MAX_TOKENS,
        "image_width": _range(counts.of("width")),
        "image_height": _range(counts.of("height")),
        "duplicates": {name: len(values) - len(np.unique(values)) for name, values in sorted(counts.hashes.items())},
    }


def _quantiles(numbers: Counter, quantiles: Sequence[float]) -> dict[str, int]:
    """Returns quantiles of the values that occur as often as `numbers` says."""
    values = sorted(numbers)
    ends = np.cumsum([numbers[value] for value in values])
    return {str(q): values[np.searchsorted(ends, q * ends[-1])] for q in quantiles}


def _range(numbers: Counter) -> dict[str, int]:
    names = ("min", *(f"quantile_{q}" for q in QUANTILES), "max")
    return dict(zip(names, _quantiles(numbers, (0, *QUANTILES, 1)).values())) if numbers else {}


def describe(report: dict) -> str:
    """Returns the report as text for the terminal."""
    places = {kind: report.get(kind, 0) for kind in ("shards", "tables", "folders")}
    lines = [f"{report['samples']:,} samples in {format_counts(places)}, {report['usable']:,} usable"]
    lines.append(f"bad: {format_counts(report['bad'])}")
    if report["miscounted"]:
        url, counts = next(iter(report["miscounted"].items()))
        first = f"{counts['samples']:,} in {url}, where it counts {counts['sizes.json']:,}"
        lines.append(f"sizes.json is wrong for {len(report['miscounted']):,} shards: {first}")
    lines.append(f"duplicates: {format_counts({f'by {k}': n for k, n in report['duplicates'].items()})}")
    if report["image_width"]:
        sizes = [" .. ".join(f"{v:,}" for v in report[name].values()) for name in ("image_width", "image_height")]
        lines.append(f"image width {sizes[0]}, height {sizes[1]} (least, 5%, 50%, 95%, most)")
    rows = []
    for key, c in report["captions"].items():
        row = {"caption": key} | {name: f"{c[name]:,}" for name in ("samples", "captions", "refused")}
        row |= {"tokens\nmean": f"{c['mean_tokens']:.1f}"}
        row |= {"\n5 / 50 / 95 / 100%": " / ".join(f"{n:,}" for n in c["token_quantiles"].values())}
        rows.append(row | {f"cut at\n{n}": f"{100 * fraction:.1f}%" for n, fraction in c["truncated_share"].items()})
    if rows:
        align = ["left"] + ["right"] * (len(rows[0]) - 1)
        lines.append(tabulate(rows, headers="keys", colalign=align, disable_numparse=True))
    return "\n".join(lines)


def write_html(path: Path, picked: list[tuple], title: str) -> None:
    """Writes a page of samples; all text from the data is escaped."""
    samples = [
        {"name": f"{source}/{key}", "captions": captions, "image": base64.b64encode(image or b"").decode()}
        for _, source, key, captions, image in picked
    ]
    page = render_page(Path(__file__).with_name("samples.html.j2"), title=title, samples=samples)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
