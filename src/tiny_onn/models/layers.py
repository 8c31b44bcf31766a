"""One block of the model: attention, then experts.

Shapes: B batch, T tokens, D hidden size, N = B*T tokens, E experts, K chosen, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny_onn.models.attention import TinyOnnAttention
from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig
from tiny_onn.models.experts_backend import experts_forward, library_function
from tiny_onn.routing import ROUTERS, GroupedExperts, MixtureOfExperts, SharedExpert
from tiny_onn.routing.experts import swiglu


class TinyOnnExperts(GroupedExperts):
    """SwiGLU experts that say of themselves what the library's implementations of experts ask.

    ``model.set_experts_implementation(name)`` hands the computation to the library's function of
    that name; the strategies of ``tiny_onn.shaping`` that watch the products get ours.
    """

    has_gate = is_concatenated = True
    has_bias = has_post_expert_norm = is_transposed = False
    act_fn = staticmethod(F.silu)
    _is_expert_parallel = False

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(
            config.num_experts, config.hidden_size, intermediate_size=config.moe_intermediate_size
        )
        self.config = config

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Mix the outputs of tokens' experts; see :class:`~tiny_onn.routing.GroupedExperts`."""
        function = library_function(self.config._experts_implementation)
        if function is not None and self.observer is None:
            return function(self, x, indices, weights)
        if self._is_expert_parallel:
            return experts_forward(self, x, indices, weights)
        return super().forward(x, indices, weights)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


class TinyOnnDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts, each on the normalised stream and added back to it."""

    def __init__(self, config: TinyOnnConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = TinyOnnAttention(config, layer_idx)
        shared = config.shared_expert_intermediate_size
        self.mlp = MixtureOfExperts(
            ROUTERS[config.router](config.hidden_size, config.num_experts),
            TinyOnnExperts(config),
            config.num_experts_per_tok,
            SharedExpert(config.hidden_size, shared) if shared else None,
            selection_bias=config.router_selection_bias,
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_dropout = float(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._drop(mixed)
        computed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self._drop(computed)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout else x
