"""Entry point of `python -m training.main`: with --train-data it trains or extracts features, otherwise it evaluates.

python -m training.main --train-data 'data/{00000..00575}.tar' --model lotlip_bert-ViT-B-16 --lock-image
python -m training.main --urban1k-retrieval data/Urban1k --model ViT-B-16 --pretrained openai
torchrun --nproc_per_node 8 -m -- training.main --dci-retrieval data/dci --model ViT-B-16 --pretrained openai
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from training.flags.model import AUTO
from training.flags.parser import parse_args
from training.runtime.messages import print_any_name
from training.runtime.processes import SIGNALS, end_process, first_imports


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        Exit code. 0: success; 1: the data can't be used, or the model diverged; 2: usage error; 70: a process ended or
        hangs; 75: stopped by a signal, continue with --resume latest; 130: Ctrl-C.
    """
    print_any_name()
    args = parse_args(argv)  # before heavy imports, so that --help and usage errors appear immediately
    try:
        with SIGNALS.caught() if args.train_data else nullcontext():
            return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    with first_imports():
        from training.runtime.distributed import RunFailedError, check_device, check_launch, failing_with, print_error

        if args.extract_image_features:
            from training.train.extract import extract as work
        elif args.train_data and args.dry_run:
            from training.train.dry_run import dry_run as work
        elif args.train_data:
            from training.train.run import train as work
        elif args.val_data:
            from training.train.validate import validate_weights as work
        else:
            from training.eval.run import evaluate as work
    try:
        with failing_with(2, ValueError):
            is_gpu = check_device(args.device).type == "cuda"
            check_launch()
        if args.precision == AUTO:  # in training as in open_clip; results of evaluations don't depend on the device
            args.precision = "amp" if args.train_data and (is_gpu or args.dry_run) else "fp32"
        return work(args)
    except RunFailedError as error:
        print_error(error)
        return error.code


if __name__ == "__main__":
    end_process(main())
