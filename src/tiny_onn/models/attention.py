"""Attention in plain matrix products, and the mask of packed sequences.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products; the quickest form on a CPU for rows of a few hundred
    tokens.

    Args:
        query: ``[B, H, T, C]``; key and value: ``[B, G, S, C]``.
        attention_mask: additive, broadcastable to ``[B, H, T, S]``, or None.

    Returns:
        The mixed values ``[B, T, H, C]`` and the attention weights ``[B, H, T, S]``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None:
        # Under autocast the mask comes in float32, whose least number is no bfloat16 but -inf.
        least = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp_min(least).to(scores.dtype)
    weights = F.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def packed_causal_mask(segment_ids_BT: Tensor, additive: bool) -> Tensor:
    """The mask ``[B, 1, T, T]`` of packed rows: causal, and within a segment only.

    Bool (True attends), or additive in float32. Plain tensor operations take a tenth of the time
    of the library's mask functions, which is that of a layer.
    """
    length = segment_ids_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & causal
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return mask[:, None]


def same_segment(segment_ids_BT: Tensor) -> Callable[..., Tensor]:
    """The mask function that lets tokens attend within their segment ``[B, T]`` only."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return segment_ids_BT[batch, query] == segment_ids_BT[batch, key]

    return mask
