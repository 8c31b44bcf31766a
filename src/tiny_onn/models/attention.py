"""Attention whose query heads are experts, attention in plain matrix products, and the mask of
packed sequences.

Shapes: B batch, T queries, S keys, N = B*T tokens, D hidden size, H query heads, G key/value heads,
C head width, K experts chosen per token, W = H/K * C width of one expert's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny_onn.models.causal_blocks import CausalMask, attention_in_blocks, blocks_pay
from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig
from tiny_onn.models.positions import rotate
from tiny_onn.routing import ROUTERS, MixtureOfExperts, RoutedHeads


class TinyOnnAttention(nn.Module):
    """Causal self-attention whose query heads and output projection are routed experts.

    An expert is ``H / K`` query heads and their part of the output projection; a token asks with K
    of them. Keys and values are shared by all experts: G heads, each asked by ``H / G`` queries.
    """

    def __init__(self, config: TinyOnnConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_width
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.kv_proj = nn.Linear(
            config.hidden_size, 2 * self.num_key_value_heads * self.head_dim, bias=False
        )
        top_k = config.attention_experts_per_tok
        width = self.num_heads // top_k * self.head_dim
        self.heads = MixtureOfExperts(
            ROUTERS[config.router](config.hidden_size, config.num_experts),
            RoutedHeads(config.num_experts, config.hidden_size, width),
            top_k,
            selection_bias=config.router_selection_bias,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | CausalMask | None,
        past_key_values: Cache | None = None,
        cache_offset: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix ``[B, T, D]`` over time; returns it with the attention weights, if there are any.

        Args:
            cache_offset: how many layers of the cache belong to earlier applications of the stack.
        """
        batch, length, _ = hidden_states.shape
        key_value = self.kv_proj(hidden_states).view(batch, length, -1, self.head_dim)
        key, value = key_value.transpose(1, 2).chunk(2, dim=1)
        key = rotate(key, *position_embeddings).to(value.dtype)
        if past_key_values is not None:
            layer_idx = self.layer_idx + cache_offset
            key, value = past_key_values.update(key, value, layer_idx)
        implementation = self.config._attn_implementation
        function: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
        if implementation != "sdpa":
            function = ALL_ATTENTION_FUNCTIONS.get_interface(
                implementation, eager_attention_forward
            )
        weights = None

        def attend(queries_NKW: Tensor) -> Tensor:
            nonlocal weights
            query = rotate(self._by_head(queries_NKW, batch), *position_embeddings)
            read, weights = function(
                self,
                query.to(value.dtype),
                key,
                value,
                attention_mask,
                scaling=self.scaling,
                dropout=self.config.attention_dropout if self.training else 0.0,
                **kwargs,
            )
            return self._by_expert(read, queries_NKW.shape)

        return self.heads(hidden_states, attend), weights

    # Query heads stand in the order of the key/value heads that they share. Under tensor
    # parallelism W is this rank's part: that of some of the key/value heads.

    @property
    def _order(self) -> tuple[int, int]:
        """Key/value heads that divide an expert's heads among them, and heads of one such share.

        With more key/value heads than an expert has heads, each place of a chosen expert has some
        of its own.
        """
        heads = self.num_heads // self.heads.num_experts_per_tok
        groups = self.num_key_value_heads if heads % self.num_key_value_heads == 0 else 1
        return groups, heads // groups

    def _by_head(self, queries_NKW: Tensor, batch: int) -> Tensor:
        """``[N, K, W]`` as ``[B, H, T, C]``."""
        _, top_k, width = queries_NKW.shape
        heads = self._order[1]
        groups = width // (heads * self.head_dim)
        apart = queries_NKW.view(batch, -1, top_k, groups, heads, self.head_dim)
        return apart.permute(0, 3, 2, 4, 1, 5).flatten(1, 3)

    def _by_expert(self, read_BTHC: Tensor, shape: torch.Size) -> Tensor:
        """``[B, T, H, C]`` as ``[N, K, W]``."""
        apart = read_BTHC.unflatten(2, (-1, shape[1], self._order[1]))
        return apart.transpose(2, 3).reshape(shape)


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
    length = query.shape[2]
    # Queries that share a key stand side by side: one product for all of them.
    query = (query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (query @ key.transpose(-2, -1)).unflatten(2, (-1, length)).flatten(1, 2)
    if attention_mask is not None:
        # Under autocast the mask comes in float32, whose least number is no bfloat16 but -inf.
        least = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp_min(least).to(scores.dtype)
    weights = F.dropout(scores.softmax(dim=-1), dropout, module.training)
    grouped = weights.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    mixed = (grouped @ value).unflatten(2, (-1, length)).flatten(1, 2)
    return mixed.transpose(1, 2), weights


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CausalMask | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's ``scaled_dot_product_attention``, or causal blocks where these are the quicker; sizes
    as in :func:`eager_attention_forward`."""
    if blocks_pay(query, key, attention_mask, dropout):
        assert not isinstance(attention_mask, Tensor)
        return attention_in_blocks(query, key, value, scaling, attention_mask), None
    if isinstance(attention_mask, CausalMask):
        attention_mask = attention_mask.allowed
    mixed, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return mixed, None


def packed_causal_mask(segment_ids_BT: Tensor, additive: bool) -> Tensor | CausalMask:
    """The mask ``[B, 1, T, T]`` of packed rows: causal, and within a segment only.

    Additive in float32 for plain products, or for :func:`sdpa_attention_forward`. Plain tensor
    operations take a tenth of the time of the library's mask functions, which is that of a layer.
    """
    length = segment_ids_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    mask = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & causal
    if additive:
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]
    return CausalMask(mask[:, None])


def same_segment(segment_ids_BT: Tensor) -> Callable[..., Tensor]:
    """The mask function that lets tokens attend within their segment ``[B, T]`` only."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return segment_ids_BT[batch, query] == segment_ids_BT[batch, key]

    return mask
