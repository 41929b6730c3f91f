"""How well one loader process mixes shards, and how much memory it needs: ours against open_clip's pipeline."""

import io
import itertools
import multiprocessing
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import webdataset

from benchmarks.measure import Figure, Setting
from training.data.order import SHUFFLE_WINDOW
from training.data.shards import ShardSource

BATCH_SIZE = 512
SHARD_SHUFFLE = {"bufsize": 2000, "initial": 500}  # of open_clip 3.3's trainer
SAMPLE_SHUFFLE = {"bufsize": 5000, "initial": 1000}
Place = tuple[str, int]  # shard, number of the sample in it


def run(setting: Setting) -> list[Figure]:
    """Reads an epoch of shards with both; images stay encoded, as they are while they wait in the buffer."""
    num_shards, per_shard, image_bytes = setting.pick((6, 200, 2_000), (20, 1000, 20_000), (20, 5000, 20_000))
    urls = make_shards(setting.folder / "mixing", num_shards, per_shard, image_bytes)
    sides = {
        "ours": lambda: _ours(urls, per_shard, SHUFFLE_WINDOW),
        "ours_window_5000": lambda: _ours(urls, per_shard, SAMPLE_SHUFFLE["bufsize"]),
        "baseline": lambda: _open_clip(urls),
    }
    found = {name: _in_a_process_of_its_own(read) for name, read in sides.items()}
    orders = {name: order for name, (order, _) in found.items()}
    if any(sorted(order) != sorted(orders["baseline"]) for order in orders.values()):
        raise AssertionError("data_mixing: both sides must read every sample once")
    memory = {name: num_bytes for name, (_, num_bytes) in found.items()}
    return [
        Figure(
            "data_mixing",
            f"mixing by one loader process: {num_shards} shards of {per_shard:,} samples of {image_bytes / 1e3:g} kB, "
            f"batches of {BATCH_SIZE}",
            {"memory_ratio": memory["baseline"] / max(memory["ours"], 1)},
            {
                "peak_bytes": memory,
                "shards_per_batch": {name: shards_per_batch(order) for name, order in orders.items()},
                "neighbours_together": {name: neighbours_together(order) for name, order in orders.items()},
            },
        )
    ]


def shards_per_batch(order: list[Place]) -> float:
    """Returns the mean number of shards from which a full batch has samples."""
    counts = [len({shard for shard, _ in batch}) for batch in _batches(order)]
    return sum(counts) / len(counts)


def neighbours_together(order: list[Place]) -> float:
    """Returns the fraction of neighbours in a shard that are in the same batch."""
    batch_of = {place: number for number, batch in enumerate(_batches(order)) for place in batch}
    pairs = [(place, (place[0], place[1] + 1)) for place in batch_of]
    together = [batch_of[one] == batch_of[other] for one, other in pairs if other in batch_of]
    return sum(together) / len(together)


def _batches(order: list[Place]) -> list[list[Place]]:
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)]


def _ours(urls: list[str], per_shard: int, window: int) -> Iterator[Place]:
    for sample in ShardSource(urls, [per_shard] * len(urls), 0, window).read(0, 0, per_shard * len(urls)):
        yield sample.source, int(sample.key)


def _open_clip(urls: list[str]) -> Iterator[Place]:
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.shuffle(**SHARD_SHUFFLE, rng=random.Random(0)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(**SAMPLE_SHUFFLE, rng=random.Random(0)),
    )
    for sample in pipeline:
        yield Path(sample["__url__"]).name, int(sample["__key__"])


def _in_a_process_of_its_own(read: Callable[[], Iterator[Place]]) -> tuple[list[Place], int]:
    """Reads in a new process; returns the order, and the largest growth of the process in bytes."""

    def work(pipe) -> None:
        process, order, peak = psutil.Process(), [], 0
        before = process.memory_full_info().uss
        for number, place in enumerate(read()):
            order.append(place)
            if number % 100 == 0:
                peak = max(peak, process.memory_full_info().uss - before)
        pipe.send((order, peak))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def make_shards(folder: Path, num_shards: int, per_shard: int, image_bytes: int) -> list[str]:
    """Writes shards of samples whose images are random bytes; returns their paths."""
    folder.mkdir(parents=True)
    stream, urls = random.Random(0), []
    for number in range(num_shards):
        urls.append(str(folder / f"{number:03d}.tar"))
        with tarfile.open(urls[-1], "w") as shard:
            for k, (suffix, size) in itertools.product(range(per_shard), (("jpg", image_bytes), ("txt", 100))):
                member = tarfile.TarInfo(f"{k:06d}.{suffix}")
                member.size = size
                shard.addfile(member, io.BytesIO(stream.randbytes(size)))
    return urls
