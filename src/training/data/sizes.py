"""How many samples each shard holds: from sizes.json, or counted from headers once."""

import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

from training.data.features import feature_files, is_feature_folder
from training.data.tables import count_rows, is_table
from training.readers.files import NUM_THREADS, file_system, parallel_map
from training.readers.samples import INDEX_CACHE, ShardIndex, cached_index, index_shard
from training.readers.streams import expand_shards, is_local

MAX_CHECKED_BYTES = 1 << 28  # total size of the shards whose samples are counted to check sizes.json


def expand_sources(spec: str) -> list[list[str]]:
    """Returns the shards of each source in the value of a flag.

    Args:
        spec: sources separated by ``::``; each is an argument of `expand_shards`, or a folder of image features.

    Raises:
        FileNotFoundError, ValueError: a local shard or folder doesn't exist, or a folder has no shard.
    """
    sources = [feature_files(name) if is_feature_folder(name) else expand_shards(name) for name in spec.split("::")]
    local = [url for urls in sources for url in urls if is_local(url)]
    missing = [url for url, is_there in zip(local, parallel_map(os.path.exists, local)) if not is_there]
    if missing:
        total = sum(map(len, sources))
        shown = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{spec}: {len(missing):,} of {total:,} shards are missing: {shown}")
    return sources


def read_sizes(url: str, flag: str | None = None) -> dict[str, int]:
    """Returns shard name -> number of samples from a ``sizes.json``, a path or a URL.

    Args:
        url: the file.
        flag: the flag that names it; None for a file that may be missing.

    Raises:
        ValueError: a file that a flag names can't be read, or a file is something else.
    """
    try:
        fs, path = file_system(url)
        text = fs.cat_file(path)
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        if flag:
            raise ValueError(f"{flag} {url}: {error}") from error
        return {}
    try:
        return {name: size for name, size in json.loads(text).items() if isinstance(size, int)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{url}: expected {{"00000.tar": 10000, ..}} ({error}); correct or remove it') from error


def known_sizes(urls: Sequence[str], sizes_file: str | None = None) -> list[int | None]:
    """Returns the number of samples of each shard by ``sizes.json``; None if it has no entry.

    Args:
        urls: the shards.
        sizes_file: path or URL of a ``sizes.json``; its names may be those of files, URLs, or files that a command
            names. Otherwise, and for shards that it lacks, the file beside the shards is read.

    Raises:
        ValueError: see `read_sizes`.
    """
    given = read_sizes(sizes_file, "--train-sizes") if sizes_file else {}
    folders = list({os.path.dirname(url) for url in urls if not url.startswith("pipe:")})
    beside = dict(zip(folders, parallel_map(lambda folder: read_sizes(os.path.join(folder, "sizes.json")), folders)))
    sizes = []
    for url in urls:
        found = [given[name] for name in _names(url) if name in given]
        sizes.append(found[0] if found else beside.get(os.path.dirname(url), {}).get(os.path.basename(url)))
    return sizes


def _names(url: str) -> list[str]:
    """Returns the names under which ``sizes.json`` may list a shard."""
    if not url.startswith("pipe:"):
        return [url, os.path.basename(url)]
    words = re.split(r"[\s'\"]+", url.removeprefix("pipe:"))
    return [url, url.removeprefix("pipe:"), *words, *map(os.path.basename, words)]


def trusted_sizes(urls: Sequence[str], sizes_file: str | None = None) -> list[int | None]:
    """Returns `known_sizes`, after checking them for the smallest local shards, up to `MAX_CHECKED_BYTES` in total.

    Raises:
        ValueError: ``sizes.json`` counts too few samples in a shard, so the others would never be read.
    """
    known = known_sizes(urls, sizes_file)
    local = [(url, size) for url, size in zip(urls, known) if size and is_local(url)]
    counted = sorted((n, *pair) for n, pair in zip(parallel_map(os.path.getsize, [url for url, _ in local]), local))
    ends = itertools.accumulate(num_bytes for num_bytes, _, _ in counted)
    for (_, url, size), end in zip(counted, ends):
        if end > MAX_CHECKED_BYTES:
            break
        found = len(index_shard(url).offsets)
        if found > size:
            path = sizes_file or os.path.join(os.path.dirname(url), "sizes.json")
            raise ValueError(f"{path}: counts {size:,} samples in {url}, which has {found:,}; remove or correct it")
    return known


def count_samples(
    urls: Sequence[str],
    sizes: Sequence[int | None] | None = None,
    index_cache: str = INDEX_CACHE,
    run_pipes: bool = False,
) -> list[int]:
    """Returns the number of samples of each shard, from ``sizes.json`` or else from the shards' headers.

    Shards at URLs are indexed by requests for their headers, once: the index is kept. In a broken shard, the samples
    before the break are counted, with a warning.

    Args:
        urls: the shards.
        sizes: the known ones; None means `trusted_sizes`.
        index_cache: folder of the kept indices.
        run_pipes: run each ``pipe:`` of unknown size once to count its samples, instead of raising.

    Raises:
        ValueError: a ``pipe:`` has no known size, a shard is not a tar file or can't be reached, or sizes are wrong.
    """
    if all(map(is_table, urls)):
        return parallel_map(count_rows, urls)
    known = trusted_sizes(urls) if sizes is None else sizes
    unknown = [url for url, size in zip(urls, known) if size is None]
    pipes = [url for url in unknown if url.startswith("pipe:")]
    if pipes and not run_pipes:
        raise ValueError(
            f"{pipes[0]}: number of samples unknown (of {len(pipes):,} commands). Name the shards by their own URLs "
            '(s3://.., gs://.., https://..), which are counted once; or add --train-sizes FILE with {"00000.tar": '
            "10000, ..}; or add --dataset-resampled and --train-num-samples"
        )
    if remote := [url for url in unknown if not is_local(url)]:
        logging.warning(
            f"{len(remote):,} shards without an entry in sizes.json, the first {remote[0]}: their samples are counted"
        )
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        work = pool.map(partial(_index, index_cache=index_cache), unknown)
        counted = dict(zip(unknown, tqdm(work, "counting samples", len(unknown), unit="shard", delay=5)))
    for url, index in counted.items():
        if index.fault and not index.offsets:
            raise ValueError(index.fault)
        if index.fault:
            logging.warning(f"{index.fault}; its {len(index.offsets):,} samples before that are used")
        elif not index.offsets:
            logging.warning(f"{url}: no sample in it")
    return [len(counted[url].offsets) if size is None else size for url, size in zip(urls, known)]


def _index(url: str, index_cache: str) -> ShardIndex:
    try:
        return index_shard(url) if is_local(url) or url.startswith("pipe:") else cached_index(url, index_cache)
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        raise ValueError(error if url in str(error) else f"{url}: {type(error).__name__}: {error}") from error
