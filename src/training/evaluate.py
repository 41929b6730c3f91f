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
from training.model.factory import EncoderParts
from training.model.source import file_sha256, resolve_weights
from training.results import (
    flatten_zero_shot,
    format_markdown,
    format_pairs,
    format_table,
    format_zero_shot,
    run_name,
    write_results,
)
from training.retrieval import RankedSet, RetrievalWork, encode_work, plan_benchmarks, rank_sets
from training.zero_shot import evaluate_zero_shot


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
    with distributed(args.device) as env:
        try:
            plan = agree(lambda: _check(args, env), env)
            parts = together(lambda: build_from_flags(args, env.device), env)
        except (ValueError, OSError) as error:
            return fail(error, 2, env)
        options = ComputeOptions(args.batch_size, args.workers, args.precision)
        try:
            ranked = _rank(parts, plan.work, env, options, args.allow_missing)
            zero_shot = evaluate_zero_shot(parts, plan.work.classification, env, options, args.allow_missing)
        except (BrokenImageError, FloatingPointError) as error:
            return fail(error, 1, env)
        if env.is_main:
            _report(args, plan, [r.record for r in ranked], zero_shot, env, time.monotonic() - start)
    return 0


def _rank(
    parts: EncoderParts, work: RetrievalWork, env: DistEnv, options: ComputeOptions, allow_broken: bool
) -> list[RankedSet]:
    if not work.sets:
        return []
    images, texts = encode_work(parts, work, env, options, allow_broken)
    return rank_sets(work, images, texts, env)


def _check(args: argparse.Namespace, env: DistEnv) -> Plan:
    """Everything that can be wrong with the command, found out before a model is built. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    check_precision(args.precision, env.device)
    work = plan_benchmarks(args)
    weights = resolve_weights(args.model, args.pretrained, args.cache_dir)
    if weights is None:
        logging.warning(f"{args.model} is UNTRAINED: no --pretrained is given, so its numbers are those of chance.")
    folder = Path(args.logs) / (args.name or run_name(args.model, args.precision)) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)  # a full or read-only disk shows now, not after an hour of encoding
    return Plan(work, weights, file_sha256(weights) if weights else None, folder)


def _report(
    args: argparse.Namespace, plan: Plan, records: list[dict], zero_shot: list[dict], env: DistEnv, seconds: float
) -> None:
    extra = {"device": str(env.device), "world_size": env.world_size, "seconds": round(seconds, 1)}
    extra |= flatten_zero_shot(zero_shot)
    path = write_results(records, plan.folder, args, plan.weights_sha256, extra)
    label = args.model if args.pretrained is None else f"{args.model} {args.pretrained}"
    if records:
        print(f"\n{label}, {args.precision}: recall in percent with 95% bootstrap intervals for R@1\n")
        print(format_table(records))
    if zero_shot:
        print(f"\n{label}, {args.precision}: accuracy in percent, open_clip's class names and templates\n")
        print(format_zero_shot(zero_shot))
    missing = {s.key: describe_missing(s) for s in plan.work.sets if s.missing}
    for record in [*records, *zero_shot]:
        if record["num_pairs"] != record["num_expected"]:
            left_out = ""
            if record["num_missing"] or record["num_broken"]:
                left_out = f" ({record['num_missing']:,} missing, {record['num_broken']:,} unreadable)"
            unit = "images" if "top1" in record else "pairs"
            counts = f"{format_pairs(record)} {unit}{left_out}"
            print(f"\n{record['title']}: {counts}; not comparable with the full benchmark.")
            if record["key"] in missing:
                print(missing[record["key"]])
    if records:
        print(f"\nFor a README (R@1, I2T / T2I):\n\n{format_markdown(records, label)}")
    print(f"\nResults: {path}")
