"""Finds the best candidates of every query, in tiles. Pure tensors."""

import torch

from training.eval.metrics import float64_device


def top_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    device: torch.device | str = "cpu",
    tile: tuple[int, int] = (1024, 16384),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k candidates with the highest scores in float64, the precision that decides ranks.

    Args:
        queries: [num_queries, dim], L2-normalised.
        candidates: [num_candidates, dim], L2-normalised.
        k: number of candidates to find; all if there are fewer.
        device: device that multiplies the tiles.
        tile: numbers of queries and of candidates of a tile.

    Returns:
        Indices of the candidates, [num_queries, k] int64, best first, and their scores, float64; on the CPU.
    """
    device = float64_device(device)
    tops, scores = [], []
    for block in queries.split(tile[0]):
        block = block.to(device, torch.float64)
        score = torch.empty(len(block), 0, dtype=torch.float64, device=device)
        top = torch.empty(len(block), 0, dtype=torch.int64, device=device)
        for first in range(0, len(candidates), tile[1]):
            found = block @ candidates[first : first + tile[1]].to(device, torch.float64).T
            found, position = found.topk(min(k, found.shape[1]), dim=1)
            score, position = torch.cat([score, found], 1), torch.cat([top, position + first], 1)
            score, kept = score.topk(min(k, score.shape[1]), dim=1)
            top = position.gather(1, kept)
        tops.append(top.cpu())
        scores.append(score.cpu())
    return torch.cat(tops), torch.cat(scores)
