"""Finds the best candidates of every query, in blocks of queries. Pure tensors."""

import torch


def top_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    device: torch.device | str = "cpu",
    block_size: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k candidates with the highest scores, in the precision that is also used to count ranks.

    Args:
        queries: [num_queries, dim], L2-normalised.
        candidates: [num_candidates, dim], L2-normalised.
        k: number of candidates to find; all if there are fewer.
        device: device that multiplies the blocks.
        block_size: number of queries per block.

    Returns:
        Indices of the candidates, [num_queries, k] int64, best first, and their scores, float64; on the CPU.
    """
    if torch.device(device).type == "mps":
        device = "cpu"  # Apple's GPUs have no float64
    k = min(k, len(candidates))
    on_device = candidates.to(device, torch.float64)
    found = [(block.to(device, torch.float64) @ on_device.T).topk(k, dim=1) for block in queries.split(block_size)]
    return torch.cat([f.indices.cpu() for f in found]), torch.cat([f.values.cpu() for f in found])
