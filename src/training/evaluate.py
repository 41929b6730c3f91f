"""One evaluation, top to bottom: check, build, encode, rank, report."""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from dataloaders.images import BrokenImageError
from dataloaders.pairs import describe_missing
from training.build import build_from_flags, check_precision
from training.distributed import DistEnv, agree, distributed, fail, together
from training.encode import ComputeOptions
from training.model.source import file_sha256, resolve_weights
from training.results import format_markdown, format_pairs, format_table, run_name, write_results
from training.retrieval import RetrievalWork, evaluate_retrieval, plan_retrieval, read_benchmarks


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out before any model is built; the same on every rank."""

    work: RetrievalWork
    weights: Path | None
    weights_sha256: str | None
    folder: Path


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates every benchmark that the flags name; rank 0 prints the table and writes results.jsonl.

    Returns:
        Exit code: 0; 1 if an image can't be read or the model gives NaN; 2 if flags, files or weights are not what
        they should be.
    """
    start = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    with distributed(args.device, args.timeout_minutes) as env:
        try:
            plan = agree(lambda: _check(args, env), env)
            parts = together(lambda: build_from_flags(args, env.device), env)
        except (ValueError, OSError) as error:
            return fail(error, 2, env)
        options = ComputeOptions(args.batch_size, args.workers, args.precision, args.text_packing != "padded")
        try:
            records = evaluate_retrieval(parts, plan.work, env, options, args.allow_missing, args.feature_cache)
        except (BrokenImageError, FloatingPointError) as error:
            return fail(error, 1, env)
        except ValueError as error:  # the cache
            return fail(error, 2, env)
        if env.is_main:
            _report(args, plan, records, env, time.monotonic() - start)
    return 0


def _check(args: argparse.Namespace, env: DistEnv) -> Plan:
    """Everything that can be wrong with the command, found out before a model is built. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    check_precision(args.precision, env.device)
    work = plan_retrieval(read_benchmarks(args), args.allow_missing)
    weights = resolve_weights(args.model, args.pretrained, args.cache_dir)
    if weights is None:
        logging.warning(f"{args.model} is UNTRAINED: no --pretrained is given, so its numbers are those of chance.")
    folder = Path(args.logs) / (args.name or run_name(args.model, args.precision)) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)  # a full or read-only disk shows now, not after an hour of encoding
    return Plan(work, weights, file_sha256(weights) if weights else None, folder)


def _report(args: argparse.Namespace, plan: Plan, records: list[dict], env: DistEnv, seconds: float) -> None:
    path = write_results(
        records,
        plan.folder,
        args,
        plan.weights_sha256,
        {"device": str(env.device), "world_size": env.world_size, "seconds": round(seconds, 1)},
    )
    label = args.model if args.pretrained is None else f"{args.model} {args.pretrained}"
    print(f"\n{label}, {args.precision}: recall in percent with 95% bootstrap intervals for R@1\n")
    print(format_table(records))
    for s, record in zip(plan.work.sets, records):
        if record["num_pairs"] != record["num_expected"]:
            left_out = ""
            if record["num_missing"] or record["num_broken"]:
                left_out = f" ({record['num_missing']:,} missing, {record['num_broken']:,} unreadable)"
            print(
                f"\n{record['title']}: {format_pairs(record)} pairs{left_out}; not comparable with the full benchmark."
            )
            if record["num_missing"]:
                print(describe_missing(s))
    print(f"\nFor a README (R@1, I2T / T2I):\n\n{format_markdown(records, label)}\n\nResults: {path}")
