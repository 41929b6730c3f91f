"""One evaluation, top to bottom: check, build, encode, rank, report."""

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dataloaders.images import BrokenImageError
from training.distributed import DistEnv, broadcast_object, check_device, distributed
from training.encode import ComputeOptions, encode_images, encode_texts
from training.model.factory import create_encoder
from training.model.source import file_sha256, resolve_weights
from training.model.truncation import count_lost_tokens
from training.results import format_markdown, format_table, write_results
from training.retrieval import RetrievalWork, evaluate_retrieval, plan_retrieval, read_benchmarks

CPU_PRECISIONS = ("fp32", "bf16", "pure_bf16", "amp_bf16", "amp_bfloat16")


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out before any model is built; the same on every rank."""

    work: RetrievalWork
    weights_sha256: str | None
    folder: Path


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates every benchmark that the flags name; rank 0 prints the table and writes results.jsonl.

    Returns:
        Exit code: 0; 1 if an image can't be read; 2 if flags, files or weights are not what they should be.
    """
    start = time.monotonic()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_device(args.device)
    except ValueError as error:
        return _fail(error, 2)
    with distributed(args.device) as env:
        try:
            plan = _agree(lambda: _check(args, env), env)
            parts = create_encoder(
                args.model, args.pretrained, precision=args.precision, device=env.device, cache_dir=args.cache_dir,
                seed=args.seed,
            )
        except (ValueError, FileNotFoundError) as error:
            return _fail(error, 2, env)
        options = ComputeOptions(args.batch_size, args.workers, args.precision)
        try:
            images = encode_images(
                parts.model, parts.preprocess, plan.work.images.paths, env, options, allow_broken=args.allow_missing
            )
        except BrokenImageError as error:
            return _fail(ValueError(f"{error}; replace the file, or add --allow-missing to leave it out"), 1, env)
        texts = encode_texts(
            parts.model, parts.tokenizer, lambda t: count_lost_tokens(parts.tokenizer, t), plan.work.texts, env, options
        )
        records = evaluate_retrieval(plan.work, images, texts, env)
        if env.is_main:
            _report(args, plan, records, env, time.monotonic() - start)
    return 0
