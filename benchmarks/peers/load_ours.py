"""Reads one epoch with our training loader; prints samples/s, measured after the first batch.

python load_ours.py SHARDS MODEL BATCH_SIZE NUM_SAMPLES WORKERS
"""

import sys
import time

import torch

import training
from training.data.open import caption_rule, open_source, open_train_data
from training.data.order import Share
from training.flags.parser import parse_args
from training.runtime.distributed import DistEnv


def main(shards: str, name: str, batch_size: str, num_samples: str, workers: str) -> None:
    """Prints samples/s."""
    flags = ["--train-data", shards, "--captions", "raw", "--num-long-captions", "0", "--batch-size", batch_size]
    args = parse_args([*flags, "--workers", workers, "--model", name])
    source = open_source(args, "--train-data", shards, caption_rule(args), DistEnv(0, 1, torch.device("cpu")))
    _, transform, _ = training.create_model_and_transforms(name)
    data = open_train_data(args, transform, training.get_tokenizer(name), source)
    share = Share(args.batch_size, int(num_samples) // args.batch_size)
    count, start = 0, 0.0
    for batch in data.loader(0, share, pin=False):
        count += len(batch.keys) if start else 0
        start = start or time.perf_counter()
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
