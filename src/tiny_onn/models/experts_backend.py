"""Our experts as a backend of the library, and the library's names for ours.

Shapes: N tokens, D hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tiny_onn.routing.experts import Implementation, Plan, compute_dtype, mixed_swiglu, sorted_plan

OURS = "tiny_onn"

IMPLEMENTATIONS: dict[str, Implementation] = {
    OURS: "auto",
    "eager": "loop",
    "grouped_mm": "grouped",
    "batched_mm": "dense",
}
"""What ``experts_implementation`` may be for a model of ours."""


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of another model in our form of grouped products: after ``import
    tiny_onn.models``, ``model.set_experts_implementation("tiny_onn")``.

    Args:
        module: SwiGLU experts in the layout ``gate_up_proj [E, 2I, D]``, ``down_proj [E, D, I]``.
        hidden_states: ``[N, D]``; top_k_index, top_k_weights: ``[N, K]``.

    Raises:
        ValueError: for experts of another form.
    """
    activation = getattr(module, "act_fn", None)
    silu = isinstance(activation, nn.SiLU) or "silu" in type(activation).__name__.lower()
    plain = module.has_gate and module.is_concatenated
    if not (plain and silu) or module.is_transposed or module.has_bias:
        raise ValueError(
            f"experts_implementation={OURS!r} computes SwiGLU experts without biases, gate before "
            f"up, one row an output. {type(module).__name__} is of another form"
        )
    x = hidden_states.to(compute_dtype(hidden_states))
    plan: Plan = sorted_plan(x, top_k_index, module.num_experts, module.gate_up_proj.shape[1] // 2)
    mixed = mixed_swiglu(plan, x, top_k_weights, module.gate_up_proj, module.down_proj)
    return mixed.to(hidden_states.dtype)


def register() -> None:
    """Make the backend known to the library by its name."""
    ALL_EXPERTS_FUNCTIONS.register(OURS, experts_forward)


def applicable(requested: str | None) -> str:
    """The implementation of a model of ours; by default our own.

    Raises:
        ValueError: naming those there are.
    """
    if requested is None:
        return OURS
    if requested not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"experts_implementation must be one of {known}. Got {requested!r}")
    return requested
