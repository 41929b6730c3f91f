"""Entry point of `python -m training.clip_benchmark`: runs CLIP_benchmark with our models.

Flags and data sets are those of CLIP_benchmark; ``--model`` and ``--pretrained`` are those of `training.main`.
"""

import sys
from collections.abc import Callable, Sequence

import torch

from training.model.assembly.factory import create_model_and_transforms, get_tokenizer


def main() -> int:
    """Runs ``clip_benchmark`` on `sys.argv`; returns its exit code, 2 if it is not installed."""
    try:
        from clip_benchmark import cli, models
        from clip_benchmark.metrics import zeroshot_classification
    except ModuleNotFoundError as error:  # CLIP_benchmark does not declare everything that it imports
        advice = "pip install clip-benchmark requests"
        print(f"training.clip_benchmark: error: {error.name} is not installed; {advice}", file=sys.stderr)
        return 2
    models.TYPE2FUNC["open_clip"] = load_model
    zeroshot_classification.accuracy = top_k_accuracy
    return cli.main() or 0


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[torch.nn.Module, Callable, Callable]:
    """Returns (model in evaluation mode, transform, tokenizer), like CLIP_benchmark's loaders.

    Raises:
        SystemExit: with code 2 if there is no such model, or if the weights do not fit it.
    """
    try:
        model, _, transform = create_model_and_transforms(
            model_name, pretrained or None, device=device, cache_dir=cache_dir
        )
        return model.eval(), transform, get_tokenizer(model_name, cache_dir=cache_dir)
    except (ValueError, OSError) as error:
        print(f"training.clip_benchmark: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def top_k_accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Returns the accuracy for each k; CLIP_benchmark 1.6's own function raises TypeError with NumPy 2.4 and later.

    Args:
        output: scores, [num_images, num_classes].
        target: indices of the right classes, [num_images].
        topk: values of k.
    """
    right = output.topk(max(topk), dim=1).indices == target[:, None]
    return [right[:, :k].any(dim=1).sum().item() / len(target) for k in topk]


if __name__ == "__main__":
    sys.exit(main())
