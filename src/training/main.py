"""The entry point: `python -m training.main --help`. Trains (or extracts) if --train-data is named, else evaluates.

python -m training.main --train-data 'data/{00000..00575}.tar' --model lotlip_bert-ViT-B-16 --lock-image
python -m training.main --urban1k-retrieval data/Urban1k --model ViT-B-16 --pretrained openai
torchrun --nproc_per_node 8 -m -- training.main --dci-retrieval data/dci --model ViT-B-16 --pretrained openai
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from training.flags.parser import parse_args
from training.runtime.processes import end_process
from training.runtime.startup import first_imports
from training.runtime.stop import EXIT_STOPPED, SIGNALS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Returns:
        Exit code: 0 done, 1 the run failed on its data, 2 the command can't be run as it stands, 70 a process has
        ended or hangs, 75 stopped by a signal (the same command with --resume latest continues), 130 Ctrl-C.
    """
    args = parse_args(argv)  # before anything heavy is imported: --help and typos answer at once
    try:
        with SIGNALS.caught() if args.train_data else nullcontext():
            return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    with first_imports():
        from training.runtime.distributed import EXIT_LOST, check_device, check_launch, fail, is_lost_rank

        if args.extract_image_features:
            from training.train.extract import extract as work
        elif args.train_data:
            from training.train.run import train as work
        else:
            from training.eval.run import evaluate as work
    try:
        check_device(args.device)
        check_launch()
    except ValueError as error:
        return fail(error, 2)
    try:
        return work(args)
    except SystemExit as stop:  # this rank alone failed, and left without waiting for the others
        return stop.code
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        if SIGNALS.name:  # the others heard of the signal, too, and were faster
            return EXIT_STOPPED
        reason = " ".join(str(error).split())[:200]
        return fail(
            RuntimeError(f"another process of this run has ended; what it said tells why ({reason})"), EXIT_LOST
        )


if __name__ == "__main__":
    end_process(main())
