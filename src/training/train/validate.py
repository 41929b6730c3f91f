"""Loss and R@1 on --val-data, during training and of given weights; the benchmarks that a training's flags name."""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip_train.precision import get_autocast
from torch import nn

from training.data.loader import NoUsableSampleError
from training.data.open import TrainData, caption_rule, open_source, open_train_data
from training.data.order import Share, Span
from training.eval.encode import Encoder
from training.eval.metrics import count_ranks, summarise
from training.eval.record import to_json
from training.eval.results import format_table, label_of, run_name, write_results
from training.eval.retrieval import RetrievalWork, evaluate_retrieval, plan_benchmarks
from training.eval.run import evaluate
from training.eval.zero_shot import evaluate_zero_shot
from training.flags.effects import has_benchmark
from training.model.assembly.from_flags import build_from_flags, find_weights
from training.model.names.files import file_sha256
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, failing_with, gather_objects, on_main_rank, stop_on_every_rank
from training.runtime.messages import or_warn
from training.runtime.watchdog import BUILDING, EVALUATING, OPENING, joined_ranks
from training.train.build import make_loss, num_corners, wrap_model
from training.train.checkpoint import CHECKPOINTS
from training.train.step import is_row_wise

logger = logging.getLogger(__name__)


@torch.no_grad()
def validate(
    data: TrainData, loss: Callable, batch_size: int, model: nn.Module, autocast: Callable, env: DistEnv
) -> dict[str, float]:
    """Evaluates a model on ``--val-data``; every usable sample counts exactly once, for any number of ranks.

    Args:
        data: the samples, read with the evaluation transform, with the captions that epoch 0 selects.
        loss: the training loss, for a single process with the whole batch.
        batch_size: number of samples of a rank that the loss compares with each other.
        model: a `TrainModel` in eval mode.
        autocast: returns the context of its forward passes.
        env: this process.

    Returns:
        The mean over samples of each loss term and of ``loss``; ``num_samples`` and ``skipped``; R@1 in both directions
        with the short caption (``short_i2t_top1``, ...) and with the first long caption (``long_i2t_top1``, ...).

    Raises:
        NoUsableSampleError: all samples are bad.
        StoppedError: a rank received a signal; raised on all ranks.
    """
    num_samples, num_bad = data.source.num_samples, 0
    num_batches = math.ceil(num_samples / (batch_size * env.world_size))
    height = math.ceil(num_samples / (num_batches * env.world_size))  # as even as possible
    whole_set = (Span(0, num_samples, 0, num_samples),)
    share = Share(height, num_batches, env.rank, env.world_size, left=whole_set)
    outputs: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(env.world_size)]  # of each rank
    batches = iter(data.loader(0, share, pin=env.device.type == "cuda", refill=False))
    for _ in range(num_batches):
        stop_on_every_rank(env)
        batch, output = next(batches, None), None  # a rank with a smaller share may have no batch left at the end
        if batch and batch.keys:
            with autocast():
                output = {name: value.float().cpu() for name, value in model(**batch.inputs_on(env.device)).items()}
        # Batch by batch, because what NCCL gathers passes through the GPU's memory.
        gathered = gather_objects((output, len(batch.bad_samples) if batch else 0), env)
        for of_rank, (rows_of_rank, bad) in zip(outputs, gathered):
            of_rank += [rows_of_rank] if rows_of_rank else []
            num_bad += bad
    found = sum(outputs, [])
    if not found:
        raise NoUsableSampleError(f"--val-data: none of its {num_samples:,} samples can be used")
    whole = found[0]
    rows = [name for name, value in whole.items() if is_row_wise(name, value, len(whole["image_features"]))]
    whole = whole | {name: torch.cat([output[name] for output in found]) for name in rows}
    result: dict[str, Any] = _mean_loss(loss, batch_size * env.world_size, whole, rows, env)
    images, texts = whole["image_features"], whole["text_features"]
    texts = texts if texts.ndim == 3 else texts[:, None]
    for number, name in enumerate(("short", "long")[: texts.shape[1]]):
        i2t, t2i = count_ranks(images, texts[:, number], torch.arange(len(images)), device=env.device)
        result |= {f"{name}_i2t_top1": summarise(i2t)["top1"], f"{name}_t2i_top1": summarise(t2i)["top1"]}
    return {"num_samples": len(images), "skipped": num_bad, **result}


def _mean_loss(
    loss: Callable, batch_size: int, whole: dict[str, torch.Tensor], rows: list[str], env: DistEnv
) -> dict[str, float]:
    """Returns the mean over samples of the loss and its terms; the ranks share the computation."""
    num_samples = len(whole["image_features"])
    number = math.ceil(num_samples / batch_size)
    batches = {name: whole[name].tensor_split(number) for name in rows}
    totals: Counter[str] = Counter()  # adds floats, too
    for k in range(env.rank, number, env.world_size):
        batch = whole | {name: batches[name][k] for name in rows}
        batch = {name: value.to(env.device) for name, value in batch.items()}
        num, terms = len(batch["image_features"]), loss(**batch, output_dict=True)
        totals.update({name: float(value) * num / num_samples for name, value in terms.items()})
    means: Counter[str] = Counter()
    for of_rank in gather_objects(totals, env):
        means.update(of_rank)
    return {"loss": means.total(), **means}


def evaluate_benchmarks(
    encoder: Encoder, work: RetrievalWork, args: argparse.Namespace, folder: Path, epoch: int, more: dict[str, object]
) -> dict[str, object]:
    """Evaluates benchmarks during training; rank 0 logs the tables and appends results to FOLDER/results.jsonl.

    Images that can't be read are logged and skipped, because a benchmark must not end the training.

    Args:
        encoder: runs the model.
        work: the benchmarks.
        args: flags.
        folder: folder of results.jsonl.
        epoch: number of epochs done.
        more: additional entries of the line in results.jsonl.

    Returns:
        The numbers under their published keys; empty if a benchmark has no readable image.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
        StoppedError: a rank received a signal.
    """
    env = encoder.env
    try:
        results = evaluate_retrieval(encoder, work)
        zero_shot = evaluate_zero_shot(encoder, work.classification)
    except BrokenImageError as error:  # raised on all ranks
        if env.is_main:
            logger.error(f"evaluation after epoch {epoch} failed, training continues: {error}")
        return {}
    if env.is_main:
        for result in (each for each in (*results, *zero_shot) if each.num_broken):
            logger.warning(
                f"{result.title}: {result.num_broken:,} pairs with images that can't be read are skipped; the results "
                f"are for {result.num_pairs:,} of {result.num_expected:,} pairs. Replace the images"
            )
        extra = {"epoch": epoch, "device": str(env.device), "world_size": env.world_size, **more}
        or_warn(lambda: write_results([*results, *zero_shot], folder, args, None, extra), "results.jsonl")
        tables = [format_table(found) for found in (results, zero_shot) if found]
        logger.info(f"after epoch {epoch}:\n" + "\n\n".join(tables))
    return to_json([*results, *zero_shot])


def shown(value: float) -> str:
    """Returns a number as people read it: a count in full, others with four decimals."""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


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
                found = validate(data, loss, args.batch_size, model, autocast, env)
            if env.is_main:
                print(f"{label_of(args)}, {args.precision}, on --val-data {args.val_data}")
                print("\n".join(f"  {name}: {shown(n)}" for name, n in found.items()))
                folder = Path(args.logs, args.name or run_name(args.model, args.precision), CHECKPOINTS)
                extra: dict[str, object] = {f"val/{name}": value for name, value in found.items()}
                sha256 = file_sha256(weights) if weights else None
                if path := or_warn(lambda: write_results([], folder, args, sha256, extra), "results.jsonl"):
                    print(f"Results: {path}")
    return evaluate(args) if has_benchmark(args) else 0
