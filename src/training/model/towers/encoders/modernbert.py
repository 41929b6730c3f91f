"""ModernBERT: rotary positions, and layers that attend to all tokens or to a window around each position."""

import torch
from torch import nn

from training.model.packing.attention import additive_mask, compute_dtype
from training.model.towers.hf_tower import CornerHFText


class ModernBert(CornerHFText):
    """ModernBERT: every third layer attends to all tokens, the others to a window."""

    model_types = ("modernbert",)
    default_pooler = "cls_last_hidden_state_pooler"

    def run(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        encoder = self.transformer
        window, dtype = encoder.config.local_attention // 2, compute_dtype(encoder.get_input_embeddings().weight)
        full = sliding = additive_mask(allowed, dtype)
        if ids.shape[1] > window + 1:  # in a shorter caption all tokens are near each other
            position = torch.arange(ids.shape[1], device=ids.device)
            near = (position[:, None] - position[None, :]).abs() <= window
            sliding = additive_mask(allowed & near, dtype)
        return encoder(input_ids=ids, attention_mask={"full_attention": full, "sliding_attention": sliding})[0]

    def layers(self) -> nn.ModuleList:
        return self.transformer.layers
