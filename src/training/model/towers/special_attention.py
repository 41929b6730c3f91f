"""Attention of [CLS] (or [EOT]) and the corner tokens over the words of a caption."""

from collections.abc import Callable

import torch
from torch import nn

from training.model.packing.attention import additive_mask
from training.model.tokenizers.corner_tokenizers import CornerCLIPTokenizer, CornerHFTokenizer
from training.model.towers.clip_tower import CornerCLIPText
from training.model.towers.corner import prefix_attention, rows_before_end, suffix_attention
from training.model.towers.hf_tower import CornerHFText


@torch.no_grad()
def special_attention(tower: nn.Module, ids: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Attention of the pooled token and of each corner over all positions, in one layer, averaged over its heads.

    Args:
        tower: `CornerHFText` with a BERT-like encoder, or `CornerCLIPText`, in eval mode.
        ids: [batch, seq_len] int64.
        layer: index of the layer, from 0 for the first; negative indices count from the last.

    Returns:
        [batch, m + 1, seq_len]; each row sums to 1.

    Raises:
        ValueError: another kind of tower, or no such layer.
    """
    if isinstance(tower, CornerCLIPText):
        layers = tower.transformer.resblocks
    elif isinstance(tower, CornerHFText) and tower.family.shows_attention:
        layers = tower.family.layers(tower.transformer)
    else:
        raise ValueError(
            f"attention can be shown for BERT-like encoders and for CLIP's text tower with corner tokens, not for a "
            f"{type(tower).__name__}; use one of our models, or add --num-corner-tokens 2"
        )
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"--layer {layer}: the text tower has layers 0 to {len(layers) - 1}, or -1 for the last")
    inputs: list[torch.Tensor] = []
    watched = layers[layer].ln_1 if isinstance(tower, CornerCLIPText) else layers[layer].attention.self.key
    # Attention's input is the output of CLIP's layer norm, or the input of BERT's linear map for keys.
    handle = watched.register_forward_hook(
        lambda _, args, output: inputs.append(output if isinstance(tower, CornerCLIPText) else args[0])
    )
    try:
        tower.all_features(ids)
    finally:
        handle.remove()
    if isinstance(tower, CornerCLIPText):
        return _clip_attention(tower, layers[layer].attn, inputs[0], ids)
    return _bert_attention(tower, layers[layer].attention.self, inputs[0], ids)


def _bert_attention(tower: CornerHFText, attention: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    num_special, heads = tower.num_corners + 1, attention.num_attention_heads
    query = attention.query(hidden[:, :num_special]).unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, h, m + 1, d]
    key = attention.key(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, h, seq_len, d]
    allowed = prefix_attention(ids != tower.pad_id, tower.num_hidden_corners, num_special)
    score = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5 + additive_mask(allowed, key.dtype)
    return score.softmax(dim=-1).mean(dim=1)


def _clip_attention(
    tower: CornerCLIPText, attention: nn.Module, hidden: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    end = (ids == tower.end_id).int().argmax(dim=-1)
    mask = additive_mask(suffix_attention(end, ids.shape[1], tower.num_corners), hidden.dtype)
    mask = mask.expand(-1, tower.heads, -1, -1).flatten(0, 1)
    _, weights = attention(hidden, hidden, hidden, need_weights=True, attn_mask=mask)  # [b, seq_len, seq_len]
    return rows_before_end(weights, end, tower.num_corners)


def words_of(tokenizer: Callable, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Joins word pieces into words.

    Args:
        tokenizer: `CornerHFTokenizer` or `CornerCLIPTokenizer`.
        ids: ids of one caption.

    Returns:
        Each word with the positions of its pieces, without special tokens, corners and padding.
    """
    if isinstance(tokenizer, CornerCLIPTokenizer):
        return _clip_words(tokenizer, ids)
    assert isinstance(tokenizer, CornerHFTokenizer)
    inner = tokenizer.tokenizer
    special = set(inner.all_special_ids) | set(tokenizer.corner_ids)
    pieces = inner.convert_ids_to_tokens(ids)
    marks = any(piece.startswith(("\u0120", "\u2581")) for piece in pieces)  # RoBERTa and XLM-R mark the start of words
    words: list[tuple[str, list[int]]] = []
    for position, (number, piece) in enumerate(zip(ids, pieces)):
        if number in special:
            continue
        if marks:
            continues_word = bool(words) and not piece.startswith(("\u0120", "\u2581"))
            piece = piece.lstrip("\u0120\u2581")
        else:
            continues_word = piece.startswith("##")
            piece = piece.removeprefix("##")
        if continues_word and words and words[-1][1][-1] == position - 1:
            words[-1] = (words[-1][0] + piece, [*words[-1][1], position])
        else:
            words.append((piece, [position]))
    return words


def _clip_words(tokenizer: CornerCLIPTokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    inner, words, open_word = tokenizer.tokenizer, [], False
    for position, number in enumerate(ids):
        if number >= inner.sot_token_id or position > 0 and ids[position - 1] == inner.eot_token_id:
            if number == inner.eot_token_id:
                break
            continue
        piece = inner.decoder[number]
        text = piece.removesuffix("</w>")
        if open_word:
            words[-1] = (words[-1][0] + text, [*words[-1][1], position])
        else:
            words.append((text, [position]))
        open_word = not piece.endswith("</w>")
    return words
