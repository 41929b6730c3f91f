"""The inputs of both sides: images with one caption each, in shards and in CLIP_benchmark's layout, and a model."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import as_photograph

MODEL = "ViT-S-32-alt"
NUM_SHARDS = 8
WORDS = "a small dog runs over wet grass beside an old red house while two people wait under grey clouds".split()


def write_training(folder: Path, num_images: int) -> str:
    """Writes shards of images of 320 x 240 pixels with captions of 16 words; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(_samples(num_images, (320, 240)))
    per_shard = -(-len(samples) // NUM_SHARDS)
    for number in range(NUM_SHARDS):
        _write_tar(folder / f"{number:05d}.tar", samples[number * per_shard : (number + 1) * per_shard])
    sizes = [len(samples[n * per_shard : (n + 1) * per_shard]) for n in range(NUM_SHARDS)]
    (folder / "sizes.json").write_text(json.dumps({f"{n:05d}.tar": size for n, size in enumerate(sizes)}))
    return f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"


def write_evaluation(folder: Path, num_images: int) -> Path:
    """Writes one shard of images of 1,200 x 800 pixels in CLIP_benchmark's layout; returns its path."""
    test = folder / "test"
    test.mkdir(parents=True, exist_ok=True)
    (test / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")
    _write_tar(test / "0.tar", list(_samples(num_images, (1200, 800))))
    return test / "0.tar"


def write_weights(path: Path) -> Path:
    """Saves untrained weights for both sides, with features that differ enough to be ranked; returns the path."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    torch.save(model.state_dict(), path)
    return path


def _samples(count: int, size: tuple[int, int]) -> Iterator[tuple[str, bytes, str]]:
    """Yields (key, JPEG, caption). The images are enlarged noise with grain, because we can't ship photographs."""
    from PIL import Image

    stream = torch.Generator().manual_seed(1)
    for number in range(count):
        buffer = io.BytesIO()
        pixels = torch.randint(0, 256, (8, 12, 3), generator=stream, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(buffer, "PNG")
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (16,), generator=stream)]
        yield f"{number:06d}", as_photograph(buffer.getvalue(), size), " ".join(words)


def _write_tar(path: Path, samples: list[tuple[str, bytes, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            for suffix, content in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
