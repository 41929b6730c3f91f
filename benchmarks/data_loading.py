"""From webdataset shards to batches: our loader against a plain pipeline of the webdataset library, in one process."""

import json

import torch
import webdataset

import training
from benchmarks.measure import Figure, Setting, fastest
from dataloaders.scenes import LONG_KEYS, write_scenes
from training.build import make_arranger
from training.data.augment import normalise_pixels, without_normalisation
from training.data.captions import CaptionRule
from training.data.loader import SampleReader, make_loader
from training.data.position import Stretch
from training.data.sources import ShardSource, count_samples

MODEL = "lotlip_tiny"


def run(setting: Setting) -> list[Figure]:
    """Decoding, the evaluation transform, one raw and three long captions tokenised."""
    num, batch_size = setting.pick((96, 32), (512, 64), (2048, 256))
    folder = setting.folder / "scenes_train"
    write_scenes(folder, num_train=num, num_test=8, seed=9)
    urls = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    model, _, preprocess = training.create_model_and_transforms(MODEL, pretrained_text=False)
    tokenizer = training.get_tokenizer(MODEL)
    arrange = make_arranger(model, "auto", setting.device, compiled=False)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
    as_bytes = without_normalisation(preprocess)
    reader = SampleReader(as_bytes, tokenizer, CaptionRule(), seed=0, epoch=0, arrange=arrange)
    source = ShardSource(urls, count_samples(urls), 0, 1000)
    stretch = Stretch(batch_size, num // batch_size, 0, 1)

    def ours() -> list[torch.Tensor]:
        loader = make_loader(source, reader, stretch, 0, pin=False)
        return [normalise_pixels(batch.images, mean, std) for batch in loader]  # in training the device does that

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

    sums = [torch.cat(work()).double().sum(dim=(1, 2, 3)).sort().values for work in (ours, baseline)]
    if sums[0].shape != sums[1].shape or not torch.allclose(*sums):
        raise AssertionError("data_loading: both sides must read the same pictures")
    seconds = fastest({"baseline": baseline, "ours": ours}, setting)
    return [
        Figure(
            "data_loading",
            f"data loading without loader processes: {num:,} samples of 1 raw + 3 long captions",
            {"time_ratio": seconds["baseline"] / seconds["ours"]},
            {"seconds": seconds, "samples_per_s": {side: num / value for side, value in seconds.items()}},
        )
    ]
