"""A rank that fails, on a network like NCCL's: afterwards no collective returns, and neither does leaving the group."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support import SMALL_LOTLIP, end_ranks, free_ports, set_rank, speak_to_files, start_ranks
from training.main import main

COLLECTIVES = ("all_reduce", "all_gather_object", "broadcast_object_list", "all_gather_into_tensor", "barrier")
FLAGS = ("--workers 0 --warmup 2 --epochs 200 --num-long-captions 1 --batch-size 4 --device cpu").split()


def never_return(*_: object, **__: object) -> None:
    threading.Event().wait()


def after_failure_like_nccl(mark: Path) -> None:
    """Makes collectives and the end of the group wait forever once a rank has failed."""
    dist.destroy_process_group = never_return
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def call(*args: object, original: object = original, **kwargs: object) -> object:
            return never_return() if mark.exists() else original(*args, **kwargs)

        setattr(dist, name, call)


def failing_rank(rank: int, argv: list[str], world_size: int, port: int, folder: str, failing: int, place: str) -> None:
    import training.train.run as run
    from training.data.loader import NoUsableSampleError
    from training.runtime.processes import end_process
    from training.train.loop import Trainer

    mark = Path(folder) / "failed"
    speak_to_files(rank, folder)
    torch.set_num_threads(1)
    set_rank(rank, world_size, port)
    after_failure_like_nccl(mark)
    errors = {
        "step": (Trainer, "_requests", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        "network": (Trainer, "_requests", RuntimeError("NCCL error: Duplicate GPU detected")),
        "data": (Trainer, "_open_epoch", NoUsableSampleError("no usable sample in 00000.tar")),
        "build": (run, "build_from_flags", FileNotFoundError("/weights/bert.safetensors: no such file")),
    }
    owner, name, error = errors[place]

    def fail(*_: object, **__: object) -> None:
        mark.touch()
        raise error

    if rank == failing:
        setattr(owner, name, fail)
    end_process(main(argv))


@pytest.mark.parametrize(
    ("place", "failing", "code"),
    [("step", 1, 1), ("step", 0, 1), ("network", 1, 1), ("data", 1, 1), ("build", 1, 2), ("build", 0, 2)],
)
def test_all_ranks_end_with_the_code_of_the_one_that_fails(place, failing, code, scenes, tmp_path):
    argv = [*SMALL_LOTLIP, *FLAGS, "--train-data", str(scenes / "train"), "--logs", str(tmp_path), "--name", "run"]
    folder = tmp_path / "said"
    folder.mkdir()
    ranks = start_ranks(failing_rank, 2, argv, 2, free_ports(1)[0], str(folder), failing, place)
    assert end_ranks(ranks, 100) == [code, code]
    own, other = ((folder / f"{rank}.err").read_text() for rank in (failing, 1 - failing))
    expected = {
        "step": "OutOfMemoryError: CUDA out of memory",
        "network": "RuntimeError: NCCL error: Duplicate GPU detected",
        "data": "error: rank 1 on ",
        "build": "/weights/bert.safetensors: no such file",
    }[place]
    assert expected in own
    assert ("Traceback (most recent call last)" in own) == (place in ("step", "network"))
    if code == 1:
        assert f"rank {1 - failing} ends, because rank {failing} on {os.uname().nodename}" in other
    assert "Traceback" not in other and "inconsistent" not in other
