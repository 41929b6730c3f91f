"""The best candidates of every query, a block of queries at a time. Pure tensors."""

import torch


def top_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    device: torch.device | str = "cpu",
    block_size: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k candidates that score highest, in the precision in which ranks are counted.

    Args:
        queries: [num_queries, dim], L2-normalised.
        candidates: [num_candidates, dim], L2-normalised.
        k: how many; all, if there are fewer.
        device: where blocks are multiplied.
        block_size: queries at a time.

    Returns:
        Numbers of the candidates [num_queries, k] int64, best first, and their scores float64; on the CPU.
    """
    if torch.device(device).type == "mps":
        device = "cpu"  # Apple's GPUs have no float64
    k = min(k, len(candidates))
    on_device = candidates.to(device, torch.float64)
    found = [(block.to(device, torch.float64) @ on_device.T).topk(k, dim=1) for block in queries.split(block_size)]
    return torch.cat([f.indices.cpu() for f in found]), torch.cat([f.values.cpu() for f in found])
