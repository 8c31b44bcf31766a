"""Our experts as a backend of the library, and the library's names for ours.

Shapes: N tokens, D hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tiny_onn.routing.experts import Implementation, Plan, compute_dtype, mixed_swiglu, sorted_plan

OURS = "tiny_onn"

IMPLEMENTATIONS: dict[str, Implementation] = {
    OURS: "auto",
    "eager": "loop",
    "batched_mm": "dense",
}
"""How our experts compute under the library's names; ``"auto"`` under every other.

Under the library's names the feed-forward experts are computed by the library itself; for the
experts of attention it has no form, so these are computed by us.
"""


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
    named_silu = "silu" in type(activation).__name__.lower()
    silu = activation is F.silu or isinstance(activation, nn.SiLU) or named_silu
    plain = module.has_gate and module.is_concatenated
    if not (plain and silu) or module.is_transposed or module.has_bias:
        raise ValueError(
            f"experts_implementation={OURS!r} computes SwiGLU experts without biases, gate before "
            f"up, one row an output. {type(module).__name__} is of another form"
        )
    x = hidden_states.to(compute_dtype(hidden_states))
    # Under expert parallelism the experts of other ranks go by a number beyond those here.
    elsewhere = top_k_index >= module.num_experts
    top_k_index = top_k_index.masked_fill(elsewhere, 0)
    top_k_weights = top_k_weights.masked_fill(elsewhere, 0.0)
    plan: Plan = sorted_plan(x, top_k_index, module.num_experts, module.gate_up_proj.shape[1] // 2)
    mixed = mixed_swiglu(plan, x, top_k_weights, module.gate_up_proj, module.down_proj)
    return mixed.to(hidden_states.dtype)


def register() -> None:
    """Make the backend known to the library by its name."""
    ALL_EXPERTS_FUNCTIONS.register(OURS, experts_forward)


def library_function(name: str | None) -> Callable[..., Tensor] | None:
    """The library's function of this name; None for our own implementations."""
    return None if name in (None, OURS, "eager") else ALL_EXPERTS_FUNCTIONS[name]


def applicable(requested: str | None) -> str:
    """The implementation of a model of ours; by default our own.

    Raises:
        ValueError: naming those there are.
    """
    known = sorted({*IMPLEMENTATIONS, *ALL_EXPERTS_FUNCTIONS.valid_keys()})
    if requested is None:
        return OURS
    if requested not in known:
        names = ", ".join(known)
        raise ValueError(f"experts_implementation must be one of {names}. Got {requested!r}")
    return requested
