"""``--val-data`` without ``--train-data``: loss and R@1 of weights, as open_clip's trainer evaluates a checkpoint."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from open_clip_train.precision import get_autocast

from training.data.loader import NoUsableSampleError
from training.data.open import caption_rule, open_source, open_train_data
from training.eval.results import label_of, run_name, write_results
from training.eval.retrieval import plan_benchmarks
from training.eval.run import evaluate
from training.flags.effects import has_benchmark
from training.model.assembly.from_flags import build_from_flags, find_weights
from training.model.names.files import file_sha256
from training.runtime.distributed import failing_with, on_main_rank
from training.runtime.messages import or_warn
from training.runtime.watchdog import BUILDING, EVALUATING, OPENING, joined_ranks
from training.train.losses import make_loss
from training.train.run import num_corners, wrap_model
from training.train.step import Stepper
from training.train.validate import validate


def validate_weights(args: argparse.Namespace) -> int:
    """Evaluates a model on ``--val-data``, then on the benchmarks that the flags name.

    Returns:
        Exit code. 0: success; 1: no sample can be used, or an image can't be read; 2: wrong flags, files or weights.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with joined_ranks(args.device, args.timeout_minutes) as (env, watchdog):
        with failing_with(2, ValueError, OSError):
            weights = on_main_rank(lambda: find_weights(args, env.device, "its numbers are at chance level"), env)
            on_main_rank(lambda: plan_benchmarks(args), env)
            watchdog.at(0, OPENING)
            source = open_source(args, "--val-data", args.val_data, caption_rule(args), env)
            watchdog.at(0, BUILDING)
            parts = build_from_flags(args, env.device)
            data = open_train_data(args, parts.preprocess, parts.tokenizer, source, parts.arrange)
        watchdog.at(0, EVALUATING)
        if args.dry_run and env.is_main:
            print(f"Dry run: nothing was encoded or written; --val-data has {source.num_samples:,} samples")
        if not args.dry_run:
            loss = make_loss(args, num_corners(parts.model), replace(env, rank=0, world_size=1))
            autocast = get_autocast(args.precision, device_type=env.device.type)
            model = wrap_model(args, parts.model).to(env.device).eval()
            with failing_with(1, NoUsableSampleError):
                found = validate(data, loss, args.batch_size, Stepper(model, parts.model, loss, None, autocast), env)
            if env.is_main:
                lines = [
                    f"  {name}: {n:.4f}" if isinstance(n, float) else f"  {name}: {n:,}" for name, n in found.items()
                ]
                print("\n".join([f"{label_of(args)}, {args.precision}, on --val-data {args.val_data}", *lines]))
                folder = Path(args.logs, args.name or run_name(args.model, args.precision), "checkpoints")
                extra = {f"val/{name}": value for name, value in found.items()}
                sha256 = file_sha256(weights) if weights else None
                if path := or_warn(lambda: write_results([], folder, args, sha256, extra), "results.jsonl"):
                    print(f"Results: {path}")
    return evaluate(args) if has_benchmark(args) else 0
