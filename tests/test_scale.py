"""The benchmark of scale: memory grows with shards alone, and loader processes divide an epoch."""

import pytest

from benchmarks import scale


def numbers(shards: int, ranks: int) -> dict:
    return scale.measure_start(shards, ranks)


def test_a_loader_process_needs_memory_for_shards_alone(monkeypatch):
    small = numbers(2000, 8)
    assert small["samples"] == 2000 * 10_000
    monkeypatch.setattr(scale, "PER_SHARD", 100_000)
    large = numbers(2000, 512)
    assert large["samples"] == 10 * small["samples"]
    for key in ("index in each rank, bytes", "loader process: additional memory while planning, bytes"):
        assert large[key] == pytest.approx(small[key], rel=0.2), key
    fewer = numbers(500, 8)["index in each rank, bytes"]
    assert 4 * fewer == pytest.approx(small["index in each rank, bytes"], rel=0.1)


def test_windows_of_all_loader_processes_are_different_samples(tmp_path, monkeypatch):
    spec = scale.write_shards(tmp_path, 12)
    urls = scale.expand_sources(spec)[0]
    source = scale.shards.ShardSource(urls, scale.count_samples(urls), seed=0)
    monkeypatch.setattr(scale.shards, "read_exactly", scale.places)
    windows = [scale.first_samples(source, rank, 3, worker) for rank in range(3) for worker in range(scale.WORKERS)]
    everything = [sample for window in windows for sample in window]
    assert len(everything) == len(set(everything)) == 3 * scale.WORKERS * scale.WINDOW
