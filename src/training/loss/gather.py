"""Exchange of features between ranks, with a gradient."""

import torch
import torch.distributed as dist

# torch 2.14 renamed these functions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """Gathers all ranks' rows in one tensor; backward sums all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, world_size: int, dtype: torch.dtype | None) -> torch.Tensor:
        ctx.world_size = world_size
        sent = rows.to(dtype or rows.dtype).contiguous()
        gathered = sent.new_empty(world_size * len(rows), *rows.shape[1:])
        _all_gather(gathered, sent)
        return gathered.to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if dist.get_backend() != "gloo":
            summed = gradient.new_empty(len(gradient) // ctx.world_size, *gradient.shape[1:])
            _reduce_scatter(summed, gradient.contiguous())
            return summed, None, None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # older releases of gloo have no reduce-scatter
        return gradient.chunk(ctx.world_size)[dist.get_rank()], None, None


def gather_rows(rows: torch.Tensor, world_size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Concatenates all ranks' rows in rank order; gradients flow back to each rank.

    Args:
        rows: [batch, ...], with the same batch on every rank.
        world_size: number of ranks; 1 returns `rows` unchanged.
        dtype: dtype in which the rows travel; None: their own. Gradients always travel in the rows' dtype, because sums
            over hundreds of ranks would lose too much in 16 bits.

    Returns:
        [world_size x batch, ...].
    """
    return rows if world_size == 1 else _Gather.apply(rows, world_size, dtype)
