"""From webdataset shards to batches: our loader against a plain pipeline of the webdataset library, in one process."""

import json
from pathlib import Path

import open_clip
import torch
import webdataset

import training
from benchmarks.measure import Figure, Setting, as_photograph, fastest
from dataloaders.scenes import LONG_KEYS, write_scenes
from training.data.captions import CaptionRule
from training.data.images import ImageReader, normalise_pixels, without_normalisation
from training.data.loader import make_loader
from training.data.order import Share
from training.data.reader import SampleReader
from training.data.shards import ShardSource
from training.data.sizes import count_samples
from training.model.assembly.from_flags import make_arranger

MODEL = "lotlip_tiny"
SIZE, MODEL_WIDTH = (384, 384), 224  # pixels: about the size of images from img2dataset, and ViT-B's input
MAX_LEVELS = 0.02  # by which pixels may differ on average, because ours are resized by torch


def run(setting: Setting) -> list[Figure]:
    """Measures decoding, the evaluation transform, and the tokenizer on one raw and three long captions."""
    num, batch_size = setting.pick((96, 32), (512, 64), (2048, 256))
    urls = make_shards(setting.folder, num)
    model = training.create_model(MODEL, pretrained_text=False)
    tokenizer = training.get_tokenizer(MODEL)
    preprocess = open_clip.image_transform(MODEL_WIDTH, is_train=False)
    mean, std = (torch.tensor(getattr(preprocess.transforms[-1], name))[:, None, None] for name in ("mean", "std"))
    images = ImageReader(without_normalisation(preprocess), "fast")
    arrange = make_arranger(model, "auto", setting.device)
    reader = SampleReader(images, tokenizer, CaptionRule(), seed=0, epoch=0, arrange=arrange)
    source = ShardSource(urls, count_samples(urls), 0, 1000)
    share = Share(batch_size, num // batch_size, 0, 1)

    def ours() -> list[torch.Tensor]:
        loader = make_loader(source, reader, share, 0, pin=False)
        # In training, the device normalises pixels.
        return [normalise_pixels(batch.inputs["image"], mean, std) for batch in loader]

    def baseline() -> list[torch.Tensor]:
        batches, pixels, ids = [], [], []
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
            record = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
            pixels.append(preprocess(sample["jpg"]))
            ids.append(torch.cat([tokenizer([record[key]]) for key in ("raw_caption", *LONG_KEYS)]))
            if len(pixels) == batch_size:
                batches.append((torch.stack(pixels), torch.stack(ids)))
                pixels, ids = [], []
        return [images for images, _ in batches]

    means = [torch.cat(work()).double().mean(dim=(1, 2, 3)).sort().values for work in (ours, baseline)]
    if means[0].shape != means[1].shape or (means[0] - means[1]).abs().max() > MAX_LEVELS / 255 / float(std.min()):
        raise AssertionError("data_loading: both sides must read the same images")
    seconds = fastest({"baseline": baseline, "ours": ours}, setting)
    return [
        Figure(
            "data_loading",
            f"data loading without loader processes: {num:,} samples of {SIZE[0]} pixels and 1 raw + 3 long captions",
            {"time_ratio": seconds["baseline"] / seconds["ours"]},
            {"seconds": seconds, "samples_per_s": {side: num / value for side, value in seconds.items()}},
        )
    ]


def make_shards(folder: Path, num: int) -> list[str]:
    """Writes shards of scenes, enlarged to the size of photographs in training data; returns their paths."""
    write_scenes(folder / "scenes_train", num_train=num, num_test=8, seed=9)
    urls = []
    for small in sorted((folder / "scenes_train" / "train").glob("*.tar")):
        urls.append(str(folder / small.name))
        with webdataset.TarWriter(urls[-1]) as shard:
            for sample in webdataset.WebDataset(str(small), shardshuffle=False):
                shard.write(
                    {k: as_photograph(v, SIZE) if k == "jpg" else v for k, v in sample.items() if k != "__url__"}
                )
    return urls
