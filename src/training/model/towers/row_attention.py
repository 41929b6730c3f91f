"""Attention within each caption of a packed row, with the corner tokens' mask.

`attend` also takes captions in buckets, see `bucket_attention`. For a row there are two implementations.
FlexAttention skips blocks outside a caption. Where FlexAttention is not available (attention dropout, CPU), PyTorch's
own attention runs on the captions as a padded batch. The padding affects only the attention; the linear layers, nearly
all of a text tower's work, always run on the row without padding.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from training.model.packing.arranger import ROW_BLOCK, CaptionArranger, Row
from training.model.packing.attention import additive_mask, attention
from training.model.packing.bucket_attention import BucketMask, attend_in_buckets
from training.model.towers.corner import prefix_attention
from training.runtime.messages import first_line

NAME = "lotlip_rows"
FLEX_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}  # for values of about 1; fp32 may be TF32 on a GPU
logger = logging.getLogger(__name__)


class RowMask(NamedTuple):
    """A row's attention mask: either `blocks`, or all the other attributes.

    Attributes:
        blocks: BlockMask of FlexAttention.
        slots: index in the row of each caption's tokens, [n, longest] int64.
        home: index in the flattened `slots` of each token of the row, [budget] int64.
        allowed: additive mask, [n, 1, longest, longest].
    """

    blocks: object | None
    slots: torch.Tensor | None
    home: torch.Tensor | None
    allowed: torch.Tensor | None


def row_slots(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the index in the row of each caption's tokens, and whether the caption has that token; [n, longest]."""
    position = torch.arange(row.longest, device=row.starts.device)
    keep = position < row.lengths[:, None]
    return (row.starts[:, None] + position).clamp(max=row.ids.shape[1] - 1), keep


def row_places(row: Row) -> torch.Tensor:
    """Returns for each token of a row the number of tokens before it in its caption, [budget].

    The values for padding are arbitrary but below `longest`.
    """
    captions = row.captions.clamp(max=len(row.starts) - 1)
    return (torch.arange(len(captions), device=captions.device) - row.starts[captions]).clamp(max=row.longest - 1)


def make_row_mask(row: Row, num_corners: int, dtype: torch.dtype, use_flex: bool) -> RowMask:
    """Creates a row's attention mask.

    Args:
        row: from `packing.CaptionArranger`, on the device.
        num_corners: m; the corners are at positions 1..m of each caption.
        dtype: dtype of the hidden states.
        use_flex: create the mask for FlexAttention.
    """
    if use_flex:
        return RowMask(_block_mask(row, num_corners), None, None, None)
    slots, keep = row_slots(row)
    num_captions = len(row.starts)
    home = row.captions.clamp(max=num_captions - 1) * row.longest + row_places(row)
    return RowMask(None, slots, home, additive_mask(prefix_attention(keep, num_corners), dtype))


def _block_mask(row: Row, num_corners: int) -> object:
    """Mask of `corner.prefix_attention` within each caption, built on the device without synchronisation."""
    from torch.nn.attention.flex_attention import BlockMask

    captions, positions = row.captions, row.positions[0]

    def rule(batch, head, query, key):
        is_corner_query = (positions[query] >= 1) & (positions[query] <= num_corners) & (query != key)
        is_corner_key = (positions[key] >= 1) & (positions[key] <= num_corners) & (query != key)
        hidden = is_corner_key | (is_corner_query & (positions[key] == 0))
        return (captions[query] == captions[key]) & ~hidden

    num_blocks = len(row.first_blocks)
    count = row.last_blocks - row.first_blocks + 1
    index = torch.arange(num_blocks, device=count.device)
    indices = (row.first_blocks[:, None] + index) % num_blocks  # only the first `count` entries of a row are used
    return BlockMask.from_kv_blocks(
        count.int()[None, None],
        indices.int()[None, None],
        BLOCK_SIZE=ROW_BLOCK,
        mask_mod=rule,
        seq_lengths=(num_blocks * ROW_BLOCK,) * 2,
    )


@cache
def _compiled_flex() -> object:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: object, scaling: float):
    from torch.nn.attention.flex_attention import flex_attention

    kernel = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return kernel(query, key, value, block_mask=blocks, scale=scaling).transpose(1, 2).contiguous()


def _attend_padded(query, key, value, mask: RowMask, dropout: float, scaling: float) -> torch.Tensor:
    """Attention of [1, heads, budget, d] each -> [1, budget, heads, d], computed as a batch [n, heads, longest, d]."""

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        rows = rows[0].transpose(0, 1).index_select(0, mask.slots.flatten())  # [n x longest, heads, d]
        return rows.unflatten(0, mask.slots.shape).transpose(1, 2)

    out = attention(unpack(query), unpack(key), unpack(value), mask.allowed, dropout, scaling)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, mask.home)[None]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature, for rows and buckets; passes other input to ``sdpa``."""
    if isinstance(attention_mask, BucketMask):
        return attend_in_buckets(query, key, value, attention_mask, dropout, scaling), None
    if not isinstance(attention_mask, RowMask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask.blocks is not None:
        return _flex(query, key, value, attention_mask.blocks, scaling), None
    return _attend_padded(query, key, value, attention_mask, dropout, scaling), None


def let_attend_in_buckets(encoder: nn.Module) -> None:
    """Replaces the encoder's attention function by `attend`; padded input still uses ``sdpa``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    encoder.set_attn_implementation(NAME)


def attends_in_buckets(encoder: nn.Module) -> bool:
    """Returns whether the encoder's attention function is `attend`."""
    return encoder.config._attn_implementation == NAME


def let_attend_in_rows(encoder: nn.Module, device: torch.device) -> None:
    """Replaces the encoder's attention function as `let_attend_in_buckets` does, and prepares it for packed rows.

    On CUDA, FlexAttention is used if `flex_fault` finds no fault. FlexAttention does not support attention dropout, and
    the check compiles for some seconds, so it is skipped for encoders with attention dropout.
    """
    let_attend_in_buckets(encoder)
    encoder.attends_by_flex = False
    if device.type == "cuda" and not encoder.config.attention_probs_dropout_prob:
        heads = encoder.config.num_attention_heads
        fault = flex_fault(device, heads, encoder.config.hidden_size // heads)
        encoder.attends_by_flex = fault is None
        if fault:
            logger.warning(f"FlexAttention can't be used here ({fault}): attention runs on padded captions instead")


def flex_fault(device: torch.device, num_heads: int, head_dim: int) -> str | None:
    """Compares FlexAttention's output and gradients on a small row with PyTorch's own attention.

    Returns:
        A description of the fault; None if both agree.
    """
    lengths = torch.tensor([3, 40, 128, 7, 90])
    ids = (torch.arange(128) < lengths[:, None]).long()
    stream = torch.Generator().manual_seed(0)
    try:
        row = CaptionArranger("flex", pad_id=0)(ids).to(device).row
        for dtype, tolerance in FLEX_TOLERANCE.items():
            shape = 4, 1, num_heads, row.ids.shape[1], head_dim
            *inputs, weights = torch.randn(shape, generator=stream).to(device, dtype)
            results = []
            for use_flex in (True, False):
                mask = make_row_mask(row, 2, dtype, use_flex)
                rows = [tensor.clone().requires_grad_() for tensor in inputs]
                out = attend(None, *rows, mask, scaling=head_dim**-0.5)[0]
                used = int(lengths.sum())  # the output for padding is arbitrary
                grads = torch.autograd.grad((out * weights.transpose(1, 2))[:, :used].sum(), rows)
                results.append(torch.cat([out.detach().transpose(1, 2), *grads])[:, :, :used].float())
            error = float((results[0] - results[1]).abs().max())
            if not error <= tolerance * max(1.0, float(results[1].abs().max())):
                return f"{dtype}: off by {error:.1e}"
    except Exception as error:  # compilers raise errors of any type
        return f"{type(error).__name__}: {first_line(error)}"
    return None
