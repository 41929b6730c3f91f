"""Reads one epoch with open_clip's training pipeline; prints samples/s, measured after the first batch.

python load_theirs.py SHARDS MODEL BATCH_SIZE NUM_SAMPLES WORKERS
"""

import sys
import time

import open_clip
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args


def main(shards: str, name: str, batch_size: str, num_samples: str, workers: str) -> None:
    """Prints samples/s."""
    flags = ["--train-data", shards, "--train-num-samples", num_samples, "--batch-size", batch_size]
    args = parse_args([*flags, "--workers", workers, "--model", name])
    args.distributed, args.rank, args.world_size = False, 0, 1
    _, transform, _ = open_clip.create_model_and_transforms(name)
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer(name))
    count, start = 0, 0.0
    for images, _ in data.dataloader:
        count += len(images) if start else 0
        start = start or time.perf_counter()
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
