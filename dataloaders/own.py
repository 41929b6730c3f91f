"""A user's own pairs of images and captions, in tar shards or in tables.

SHARD.tar: KEY.jpg (or another suffix of `IMAGE_SUFFIXES`) with KEY.txt, or with captions in KEY.json

A table has a column of image paths, which are relative to the table's folder, and one or more columns of captions.
Parquet may hold the images themselves, as data sets on the Hugging Face hub do. Rows with the same image path, or the
same bytes of an image, give one image further captions.

Captions are left unchanged, unless the rule of the long benchmarks is chosen.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from dataloaders.pairs import RetrievalSet, retrieval_set
from training.readers.captions import caption_texts, is_unicode, normalise_caption, read_record
from training.readers.faults import BadSample
from training.readers.files import IMAGE_SUFFIXES, EmbeddedImage, ShardMember
from training.readers.samples import OF_ONE_SAMPLE, SEVERAL_LINES, TEXT_SUFFIXES, RawSample, read_samples
from training.readers.streams import expand_shards, is_local, local_copy
from training.readers.table_files import check_image_path, local_spec, table_files

CAPTION_KEYS = ("caption", "raw_caption", "txt", "title", "text", "long_caption", "conversations")


def _captions_of(record: Mapping, keys: Sequence[str], lists: str, lines: bool, where: str) -> list[str]:
    """Returns the captions of a sample or row under some keys; by default, those under the first that has any.

    Args:
        record: key or column -> value.
        keys: the keys or columns; if empty, `CAPTION_KEYS`.
        lists, lines: see `caption_texts`; `lines` is about a ``txt`` alone.
        where: what the message of an error begins with.
    """
    found: list[str] = []
    for key in keys or CAPTION_KEYS:
        texts = caption_texts(record.get(key), f"{where}, {key}", lists, lines and key == "txt")
        if not all(map(is_unicode, texts)):
            raise ValueError(f"{where}, {key}: half a surrogate pair, expected text that can be written as UTF-8")
        found += texts
        if texts and tuple(keys) in ((), CAPTION_KEYS):
            break
    return found


def _as_set(spec: str, files: Sequence[str | Path], pairs: Iterable[tuple], rule: str) -> RetrievalSet:
    """Builds the set of pairs (image, its captions), which is named after its file, folder or hub data set."""
    apply = normalise_caption if rule == "long" else str
    pairs, name = [(image, [apply(text) for text in captions]) for image, captions in pairs], _set_name(spec, files)
    return retrieval_set(f"{name}-retrieval", name, pairs)


def _set_name(spec: str, files: Sequence[str | Path]) -> str:
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


def read_shard_pairs(
    shards: str, caption_keys: Sequence[str] = (), rule: str = "raw", lists: str = "alternatives", lines: bool = False
) -> RetrievalSet:
    """Reads pairs from tar shards; images are read from the shards when needed.

    Args:
        shards: see `expand_shards`; several are separated by ``::``. The output of a ``pipe:`` and compressed shards
            are unpacked to temporary files.
        caption_keys: keys of the ``.json`` that hold a text or a list of texts; all that exist are read. If none does,
            the ``.txt`` is read. By default, the first of `CAPTION_KEYS` that has captions is read.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        lists: see `caption_texts`.
        lines: each line of a ``.txt`` is a caption of its own, as in CLIP_benchmark's shards.

    Raises:
        FileNotFoundError, ValueError: a shard is missing or broken, or a sample lacks an image or a caption.
    """
    pairs: list[tuple[ShardMember, list[str]]] = []
    num_with_lines = 0
    urls = [url for name in shards.split("::") for url in expand_shards(name)]
    for url in urls:
        if is_local(url) and not os.path.exists(url):
            raise FileNotFoundError(f"{url}: no such file")
        num_before, path = len(pairs), local_copy(url)
        for raw in read_samples(path, load=TEXT_SUFFIXES):
            try:
                record = read_record(raw.files)
                wanted = caption_keys if any(key in record for key in caption_keys or CAPTION_KEYS) else ("txt",)
                texts = _captions_of(record, wanted, lists, lines, "key")
            except ValueError as error:
                raise ValueError(f"{url}: sample {raw.key}: broken caption ({error})") from error
            num_with_lines += not lines and "txt" in raw.files and any("\n" in text for text in texts)
            pairs.append((_image_of(raw, path, texts, caption_keys or CAPTION_KEYS, url), texts))
        if len(pairs) == num_before:
            size = f"its {os.path.getsize(path):,} bytes" if is_local(path) else "it"
            raise ValueError(f"{url}: no sample in {size}; fetch it again, or leave it out")
    if num_with_lines:
        logging.warning(f"--retrieval-wds {shards}: {num_with_lines:,} of {len(pairs):,} samples have {SEVERAL_LINES}")
    return _as_set(shards, urls, pairs, rule)


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


def read_table_pairs(
    spec: str | Path,
    image_column: str | None = None,
    caption_keys: Sequence[str] = (),
    rule: str = "raw",
    separator: str | None = None,
    lists: str = "alternatives",
    lines: bool = False,
) -> RetrievalSet:
    """Reads pairs from tables.

    Args:
        spec: one or several files, or a folder; see `table_files`.
        image_column: column of paths, absolute or relative to the table's folder, or in Parquet of the images
            themselves; see `choose_image_column`.
        caption_keys: columns of captions; see `caption_texts`. Columns that the table lacks are ignored. By default,
            the first of `CAPTION_KEYS` that has captions is read.
        rule: ``raw``, or ``long`` to split and join captions as the long benchmarks do.
        separator: separator of a CSV; see `choose_form`.
        lists: see `caption_texts`.
        lines: each line of the ``.txt`` beside an image is a caption of its own.

    Raises:
        FileNotFoundError, ValueError: a file or a column is missing, a row lacks an image or a caption, a caption is
            not a text, or a row has too few or too many cells; the message names the row.
    """
    pairs: dict[object, tuple[Path | EmbeddedImage, list[str]]] = {}
    num_repeated = 0
    paths = table_files(local_spec(str(spec)))
    for path in paths:
        for key, image, row, where in _rows(path, image_column, caption_keys or CAPTION_KEYS, separator):
            texts = _captions_of(row, caption_keys, lists, lines, where) if image else []
            if not image or not texts:
                raise ValueError(f"{where} lacks an image or a caption; complete or remove it")
            num_repeated += key in pairs and key is not image
            pairs.setdefault(key, (image, []))[1].extend(texts)
    if num_repeated:
        logging.warning(
            f"--retrieval-table {spec}: {num_repeated:,} rows hold the same bytes as the image of an earlier row; "
            f"their captions are further captions of that image, so there are {len(pairs):,} images"
        )
    return _as_set(str(spec), paths, pairs.values(), rule)


def _rows(
    path: Path, image_column: str | None, caption_keys: Sequence[str], separator: str | None
) -> Iterator[tuple[object, Path | EmbeddedImage | None, dict, str]]:
    """Yields for each row a key that is equal for equal images, the image, the row, and what messages call it."""
    # --help has no time for pyarrow
    from training.readers.columnar import ColumnarFile
    from training.readers.tables import caption_columns, choose_image_column, open_table, row_sample

    table, number = open_table(path, separator, strict=True), 0
    column = choose_image_column(table, image_column)
    columns = [column, *caption_columns(table, column, caption_keys, "--caption-keys")]
    rows = table.rows(columns) if isinstance(table, ColumnarFile) else iter(table.load(columns))
    try:
        for number, row in enumerate(rows, start=1):
            where, sample = f"{path}: row {number:,}", row_sample(path, number, row, column)
            if sample.image:
                key = blake2b(sample.image, digest_size=16).digest()
                yield key, EmbeddedImage(path, column, number - 1), row, where
                continue
            check_image_path(row.get(column), where)
            image = Path(os.path.abspath(sample.image_path)) if sample.image_path else None
            yield image, image, row, where
    except BadSample as error:
        raise ValueError(f"{path}: row {number + 1:,}: {error}") from error
