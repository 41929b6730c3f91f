"""Evaluation during training: loss and R@1 on --val-data, and the benchmarks that the flags name."""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from training.data.loader import NoUsableSampleError
from training.data.open import TrainData
from training.data.order import Share, Span
from training.eval.encode import Encoder
from training.eval.metrics import count_ranks, summarise
from training.eval.record import to_json
from training.eval.results import format_table, write_results
from training.eval.retrieval import RetrievalWork, evaluate_retrieval
from training.eval.zero_shot import evaluate_zero_shot
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, gather_objects, stop_on_every_rank
from training.runtime.messages import or_warn
from training.train.step import Stepper, is_row_wise

logger = logging.getLogger(__name__)


@torch.no_grad()
def validate(data: TrainData, loss: Callable, batch_size: int, stepper: Stepper, env: DistEnv) -> dict[str, float]:
    """Evaluates a model on ``--val-data``; every usable sample counts exactly once, for any number of ranks.

    Args:
        data: the samples, read with the evaluation transform, with the captions that epoch 0 selects.
        loss: the training loss, for a single process with the whole batch.
        batch_size: number of samples of a rank that the loss compares with each other.
        stepper: holds the model, in eval mode.
        env: this process.

    Returns:
        The mean over samples of each loss term and of ``loss``; ``num_samples`` and ``skipped``; R@1 in both directions
        with the short caption (``short_i2t_top1``, ...) and with the first long caption (``long_i2t_top1``, ...).

    Raises:
        NoUsableSampleError: all samples are bad.
        StoppedError: a rank received a signal; raised on all ranks.
    """
    model = getattr(stepper.model, "module", stepper.model)  # the ranks' numbers of batches differ, so not DDP
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
            with stepper.autocast():
                output = {name: value.float().cpu() for name, value in model(**batch.inputs_on(env.device)).items()}
        # Batch by batch, because what NCCL gathers passes through the GPU's memory.
        gathered = gather_objects((output, len(batch.bad_samples) if batch else 0), env)
        for of_rank, (found, bad) in zip(outputs, gathered):
            of_rank += [found] if found else []
            num_bad += bad
    whole = _joined(sum(outputs, []))
    if not whole:
        raise NoUsableSampleError(f"--val-data: none of its {num_samples:,} samples can be used")
    result = _mean_loss(loss, batch_size * env.world_size, whole, env)
    images, texts = whole["image_features"], whole["text_features"]
    texts = texts if texts.ndim == 3 else texts[:, None]
    for number, name in enumerate(("short", "long")[: texts.shape[1]]):
        i2t, t2i = count_ranks(images, texts[:, number], torch.arange(len(images)), device=env.device)
        result |= {f"{name}_i2t_top1": summarise(i2t)["top1"], f"{name}_t2i_top1": summarise(t2i)["top1"]}
    return {"num_samples": len(images), "skipped": num_bad, **result}


def _joined(outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenates the rows of the model's outputs, in this order; {} without any."""

    def join(name: str, value: torch.Tensor) -> torch.Tensor:
        is_rows = is_row_wise(name, value, len(outputs[0]["image_features"]))
        return torch.cat([output[name] for output in outputs]) if is_rows else value

    return {name: join(name, value) for name, value in outputs[0].items()} if outputs else {}


def _mean_loss(loss: Callable, batch_size: int, whole: dict[str, torch.Tensor], env: DistEnv) -> dict[str, float]:
    """Returns the mean over samples of the loss and its terms; the ranks share the computation."""
    num_samples = len(whole["image_features"])
    number = math.ceil(num_samples / batch_size)
    parts = {n: value.tensor_split(number) for n, value in whole.items() if is_row_wise(n, value, num_samples)}
    totals: Counter[str] = Counter()  # adds floats, too
    for k in range(env.rank, number, env.world_size):
        batch = {name: parts[name][k] if name in parts else value for name, value in whole.items()}
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
