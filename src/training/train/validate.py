"""Evaluation during training: loss and R@1 on --val-data, retrieval on whichever benchmarks are named."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloaders.images import BrokenImageError
from training.data.images import IN_EVALUATION
from training.data.open import TrainData
from training.data.position import Share
from training.eval.encode import ComputeOptions
from training.eval.metrics import count_ranks, summarise
from training.eval.record import Result, to_json
from training.eval.results import format_table, format_zero_shot, write_results
from training.eval.retrieval import RetrievalWork, evaluate_retrieval
from training.eval.zero_shot import evaluate_zero_shot
from training.model.factory import EncoderParts
from training.runtime.distributed import DistEnv, sum_over_ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSet:
    """``--val-data``, read through the evaluation transform.

    Attributes:
        data: its samples, with the captions that epoch 0 chooses.
        share: this rank's part: whole batches, as many on every rank.
    """

    data: TrainData
    share: Share

    @classmethod
    def of(cls, data: TrainData, batch_size: int, env: DistEnv) -> "ValidationSet":
        """Divides the samples over ranks; up to a batch per rank is left over, which is logged."""
        num_samples = data.source.num_samples
        batch_size = min(batch_size, num_samples // env.world_size)
        if not batch_size:
            raise ValueError(f"--val-data: {num_samples} samples for {env.world_size} processes; give more")
        num_batches = num_samples // (batch_size * env.world_size)
        num_used = num_batches * batch_size * env.world_size
        if env.is_main and num_used != num_samples:
            logger.warning(f"--val-data: {num_used:,} of {num_samples:,} samples are used, in whole batches")
        return cls(data, Share(batch_size, num_batches, env.rank, env.world_size))


@torch.no_grad()
def validate(
    val: ValidationSet,
    model: torch.nn.Module,
    loss: Callable,
    autocast: Callable,
    env: DistEnv,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measures a model on ``--val-data``.

    Args:
        val: the samples.
        model: a `TrainModel`, in eval mode.
        loss: of training.
        autocast: makes the context of the forward pass.
        env: this process.
        before_batch: called before each batch, as often on every rank; may raise on all of them.

    Returns:
        Mean of each loss term and ``loss``; ``num_samples``; R@1 in both directions with the short caption
        (``short_i2t_top1``, ..) and with the first long one (``long_i2t_top1``, ..).
    """
    terms, images, texts, num_faults = [], [], [], 0
    for batch in val.data.loader(0, val.share, pin=env.device.type == "cuda"):
        before_batch()
        with autocast():
            output = {name: value.float() for name, value in model(**batch.inputs_on(env.device)).items()}
        terms.append(loss(**output, output_dict=True))
        text = output["text_features"]
        text = text if text.ndim == 3 else text[:, None]
        images.append(output["image_features"].cpu())
        texts.append(text[:, :2].cpu())
        num_faults += len(batch.bad_samples)
    means = torch.tensor([[float(v) for v in t.values()] for t in terms], dtype=torch.float64).mean(dim=0)
    means = sum_over_ranks(means, env) / env.world_size
    result = dict(zip(terms[0], means.tolist()))
    result = {"loss": sum(result.values()), **result}
    images, texts = _all_rows(torch.cat(images), env), _all_rows(torch.cat(texts), env)
    for number, name in enumerate(("short", "long")[: texts.shape[1]]):
        i2t, t2i = count_ranks(images, texts[:, number], torch.arange(len(images)), device=env.device)
        result |= {f"{name}_i2t_top1": summarise(i2t)["top1"], f"{name}_t2i_top1": summarise(t2i)["top1"]}
    skipped = int(sum_over_ranks(torch.tensor([num_faults]), env))
    return {"num_samples": len(images), "skipped": skipped, **result}


def _all_rows(rows: torch.Tensor, env: DistEnv) -> torch.Tensor:
    """[n, ..] of each rank -> [world_size x n, ..] on all."""
    everything = torch.zeros(env.world_size * len(rows), *rows.shape[1:])
    everything[env.rank * len(rows) : (env.rank + 1) * len(rows)] = rows
    return sum_over_ranks(everything, env)


def evaluate_benchmarks(
    parts: EncoderParts,
    work: RetrievalWork,
    args: argparse.Namespace,
    folder: Path,
    epoch: int,
    env: DistEnv,
    more: dict[str, object],
) -> dict[str, object]:
    """Evaluates retrieval in mid-training; rank 0 logs the table and appends it, and `more`, to FOLDER/results.jsonl.

    Images that can't be read are logged and left out: a benchmark must not end the training.

    Returns:
        The published keys with their numbers; nothing if a benchmark has no readable image left.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
        StoppedError: a signal came to some rank.
    """
    options = ComputeOptions(
        args.batch_size,
        args.workers,
        args.precision,
        args.text_packing != "padded",
        image_decoding=args.image_decoding or IN_EVALUATION,
        image_cache=args.image_cache,
    )
    try:
        results = evaluate_retrieval(parts, work, env, options, allow_broken=True) if work.sets else []
        zero_shot = evaluate_zero_shot(parts, work.classification, env, options, allow_broken=True)
    except BrokenImageError as error:  # on all ranks alike
        if env.is_main:
            logger.error(f"evaluation after epoch {epoch} failed, training continues: {error}")
        return {}
    if env.is_main:
        _warn_of_broken_images([*results, *zero_shot])
        extra = {"epoch": epoch, "device": str(env.device), "world_size": env.world_size, **more}
        write_results([*results, *zero_shot], folder, args, None, extra)
        tables = [format_table(results)] * bool(results) + [format_zero_shot(zero_shot)] * bool(zero_shot)
        logger.info(f"after epoch {epoch}:\n" + "\n\n".join(tables))
    return to_json([*results, *zero_shot])


def _warn_of_broken_images(results: list[Result]) -> None:
    for result in results:
        if result.num_broken:
            logger.warning(
                f"{result.title}: {result.num_broken:,} pairs with images that can't be read are left out; its "
                f"numbers are over {result.num_pairs:,} of {result.num_expected:,}. Replace the images"
            )
