"""A mixture of experts: one router, its experts, and the decision that joins them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_onn.routing.experts import Experts, swiglu
from tiny_onn.routing.routers import Routing, route


class MixtureOfExperts(nn.Module):
    """One routed site of a model: each token is computed by the ``num_experts_per_tok`` experts
    its router prefers.

    The module is what ties a router to its experts: routing shaping finds the sites of a model by
    looking for this class, and reads ``site.experts`` for the costs of ``site.router``'s choices.

    Args:
        router: maps tokens ``[N, D]`` to raw logits ``[N, E]``.
        experts: the E experts.
        num_experts_per_tok: K, between 1 and E (K = E is a soft mixture).
        shared: an expert that computes every token, beside the chosen ones (arXiv:2401.06066), or
            None.
        selection_bias: whether to keep a bias ``[E]`` that counts in the choice of experts, not in
            their weights (arXiv:2408.15664): a buffer that the strategy ``"bias"`` of
            ``tiny_onn.shaping`` moves.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        num_experts_per_tok: int,
        shared: nn.Module | None = None,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= experts.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts={experts.num_experts}. "
                f"Got {num_experts_per_tok}"
            )
        self.router = router
        self.experts = experts
        self.num_experts_per_tok = num_experts_per_tok
        self.shared = shared
        bias = torch.zeros(experts.num_experts) if selection_bias else None
        self.register_buffer("selection_bias", bias)

    def choose(self, logits_NE: Tensor) -> Routing:
        """The routing decision for raw logits ``[N, E]``."""
        return route(logits_NE, self.num_experts_per_tok, self.selection_bias)

    def forward(self, hidden_states: Tensor, *inputs: Any) -> Tensor:
        """Map ``[..., D]`` to ``[..., O]``; further inputs are handed to the experts."""
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.choose(self.router(x_ND))
        y_NO = self.experts(x_ND, routing.indices, routing.weights, *inputs)
        y = y_NO.view(*hidden_states.shape[:-1], y_NO.shape[-1])
        return y if self.shared is None else y + self.shared(hidden_states)


class SharedExpert(nn.Module):
    """A SwiGLU block that computes every token.

    Args:
        hidden_size: D; intermediate_size: its width.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.down_proj(swiglu(self.gate_up_proj(hidden_states)))
