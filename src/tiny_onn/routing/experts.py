"""Experts as stacked matrices, computed as grouped products over tokens sorted by expert.

Shapes: N tokens, D hidden size, E experts, K chosen per token, P = N*K (token, expert) pairs,
I expert width, O output width.

A plain loop over experts is the reference that the tests hold everything here against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.routing.dispatch import Dispatch, Gather, Sum, dispatch, sort
from tiny_onn.routing.grouped import (
    few_lengths_pay,
    grouped_linear,
    grouped_mm_accepts,
    loop_linear,
)

Implementation = Literal["auto", "grouped", "dense", "loop"]

SMALL_PRODUCTS, SMALL_BYTES = 1 << 25, 1 << 22
"""On a CPU so few products of tokens with all weights, where these fit a cache, take less time than
sorting the tokens by expert does."""

FEW_TOKENS = 32
"""With so few tokens, as in decoding, most experts' weights are read whatever is computed: on a CPU
one batched product with all of them reads these twice as fast as product by product the chosen."""


Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The product of sorted rows with their experts' matrices, from rows, matrices and offsets."""

Observer = Callable[[Dispatch], Callable[[Tensor, Tensor], object]]
"""Told how a call's rows are sorted, it returns what is told the rows that go into each product and
those that come out."""


class Plan(NamedTuple):
    """How one call is computed: the sorted rows, and the product of rows with their experts."""

    dispatch: Dispatch
    linear: Linear


class Experts(nn.Module):
    """What all experts share: their number and width, and how a call is computed.

    Args:
        num_experts: E; hidden_size: D; inner_size: width of what the experts compute inside.
        output_size: O.
        implementation: ``"grouped"`` (sorted tokens and ``grouped_mm``), ``"loop"`` (sorted tokens,
            one expert after the other, any dtype and width), ``"dense"`` (all experts for all
            tokens), or ``"auto"``: dense where all experts are chosen or there is next to nothing
            to compute, else grouped wherever ``grouped_mm`` takes the dtype and the widths.

    Attributes:
        observer: watches the products of every call, which are then never computed densely.
    """

    observer: Observer | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        output_size: int,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if implementation not in get_args(Implementation):
            known = ", ".join(map(repr, get_args(Implementation)))
            raise ValueError(f"implementation must be one of {known}. Got {implementation!r}")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.implementation = implementation
        self._widths = (hidden_size, inner_size, output_size)

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def plan(self, x: Tensor, indices: Tensor) -> Plan | None:
        """How to compute tokens ``x [N, D]`` with their chosen experts ``[N, K]``; None for all
        experts densely.

        Raises:
            ValueError: if grouped products are asked for and can't be had.
        """
        implementation = self._implementation_for(indices, x)
        if implementation == "dense":
            return None
        plan = _plan(x, indices, self.num_experts, grouped=implementation == "grouped")
        if self.observer is None:
            return plan
        return plan._replace(linear=_seen(plan.linear, self.observer(plan.dispatch)))

    def _implementation_for(self, indices: Tensor, x: Tensor) -> Implementation:
        """The implementation asked for, or the quickest by what ``docs/log.md`` measured."""
        accepts = grouped_mm_accepts(x.dtype, *self._widths)
        if self.implementation == "grouped" and not accepts:
            raise ValueError(
                f"implementation='grouped' needs float32 or bfloat16 and rows of a multiple of 16 "
                f"bytes. Got {x.dtype} with widths {list(self._widths)}"
            )
        if self.implementation in ("grouped", "loop"):
            return self.implementation
        all_chosen = indices.shape[1] == self.num_experts
        dense = self.implementation == "dense" or all_chosen or self._is_small(x, indices)
        if dense and self.observer is None:
            return "dense"
        return "grouped" if accepts else "loop"

    def _is_small(self, x: Tensor, indices: Tensor) -> bool:
        if x.device.type != "cpu":
            return False
        if len(x) <= FEW_TOKENS and indices.numel() >= self.num_experts:
            return True
        weights = sum(weight.numel() for weight in self.parameters())
        return len(x) * weights <= SMALL_PRODUCTS and weights * x.element_size() <= SMALL_BYTES


class GroupedExperts(Experts):
    """E experts in stacked parameters, each token computed by its K chosen ones.

    With ``intermediate_size`` the experts are SwiGLU blocks in the Hugging Face layout:
    ``gate_up_proj [E, 2I, D]`` and ``down_proj [E, D, I]``. Without it they are plain linear maps
    ``proj [E, O, D]``.

    Args:
        num_experts: E.
        hidden_size: D.
        output_size: O; the hidden size by default.
        intermediate_size: I, or None for plain linear experts.
        implementation: see :class:`Experts`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        output_size: int | None = None,
        intermediate_size: int | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        check_sizes(
            num_experts=num_experts,
            hidden_size=hidden_size,
            output_size=output_size,
            intermediate_size=intermediate_size,
        )
        output_size, inner_size = output_size or hidden_size, intermediate_size or hidden_size
        super().__init__(num_experts, hidden_size, inner_size, output_size, implementation)
        self.intermediate_size = intermediate_size
        if intermediate_size is None:
            self.proj = nn.Parameter(torch.empty(num_experts, output_size, hidden_size))
        else:
            self.gate_up_proj = nn.Parameter(
                torch.empty(num_experts, 2 * intermediate_size, hidden_size)
            )
            self.down_proj = nn.Parameter(torch.empty(num_experts, output_size, intermediate_size))
        self.reset_parameters()

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Mix the chosen experts' outputs.

        Args:
            x: tokens ``[N, D]``.
            indices: the chosen experts, int64 ``[N, K]``.
            weights: their mixing weights ``[N, K]``; they carry the router's gradient.

        Returns:
            ``[N, O]`` in the compute dtype (the autocast dtype where autocast is on).
        """
        x = x.to(compute_dtype(x))
        plan = self.plan(x, indices)
        if plan is None:
            return self._dense(x, dense_weights(weights, indices, self.num_experts, x.dtype))
        if self.intermediate_size is not None:
            return mixed_swiglu(plan, x, weights, self.gate_up_proj, self.down_proj)
        (token, slot, offsets), linear = plan
        weighed_PD = Gather.apply(x, token, slot) * _sorted_weights(plan, weights, x.dtype)
        return Sum.apply(linear(weighed_PD, self.proj.to(x.dtype), offsets), token, slot)

    def _dense(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Every expert for every token; those that were not chosen weigh nothing."""
        if self.intermediate_size is None:
            y_ENO = all_products(x_ND, self.proj.to(x_ND.dtype))
            return (weights_NE[:, None] @ y_ENO.transpose(0, 1)).squeeze(1)
        gate_up_ENI = all_products(x_ND, self.gate_up_proj.to(x_ND.dtype))
        inner_ENI = swiglu(gate_up_ENI, weights_NE.t()[:, :, None])
        return sum_of_products(inner_ENI, self.down_proj.to(x_ND.dtype))

    def extra_repr(self) -> str:
        kind = "linear" if self.intermediate_size is None else f"swiglu {self.intermediate_size}"
        return f"{self.num_experts} x {kind}, {self.hidden_size} -> {self.output_size}"


def sorted_plan(x: Tensor, indices: Tensor, num_experts: int, inner_size: int) -> Plan:
    """The quickest plan that sorts tokens ``x [N, D]`` by their experts ``[N, K]``."""
    grouped = grouped_mm_accepts(x.dtype, x.shape[-1], inner_size)
    return _plan(x, indices, num_experts, grouped)


def _plan(x: Tensor, indices: Tensor, num_experts: int, grouped: bool) -> Plan:
    if not grouped:
        return Plan(dispatch(indices, num_experts), loop_linear)
    filled = few_lengths_pay(x.dtype, x.device)
    return Plan(dispatch(indices, num_experts, filled), grouped_linear)


def mixed_swiglu(
    plan: Plan, x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The mixture ``[N, O]`` of SwiGLU experts ``[E, 2I, D]`` and ``[E, O, I]`` of tokens
    ``x [N, D]``, by weights ``[N, K]`` that go in before the last product."""
    (token, slot, offsets), linear = plan
    gate_up_PI = linear(Gather.apply(x, token, slot), gate_up_proj.to(x.dtype), offsets)
    inner_PI = swiglu(gate_up_PI, _sorted_weights(plan, weights, x.dtype))
    return Sum.apply(linear(inner_PI, down_proj.to(x.dtype), offsets), token, slot)


def _sorted_weights(plan: Plan, weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Mixing weights ``[P, 1]`` of the sorted rows."""
    rows = plan.dispatch
    return sort(weights_NK[:, :, None].to(dtype), rows.slot, len(rows.token))


def _seen(linear: Linear, see: Callable[[Tensor, Tensor], object]) -> Linear:
    def product(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
        y_PO = linear(x_PD, weight_EOD, offsets_E)
        see(x_PD, y_PO)
        return y_PO

    return product


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weights`` of a last dimension that holds both, gate first; the weights
    have a last dimension of 1."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGLU.apply(gate_up, weights)
    gate, up = gate_up.chunk(2, -1)
    inner = F.silu(gate) * up
    return inner if weights is None else inner * weights


class _SwiGLU(torch.autograd.Function):
    """:func:`swiglu`, whose gradient is written straight to its place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, -1)
        inner = F.silu(gate).mul_(up)
        return inner if weights is None else inner.mul_(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up, grad_weights = torch.empty_like(gate_up), None
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        activated, grad_activated = F.silu(gate), grad * up
        torch.mul(grad, activated, out=grad_up)
        if weights is not None:
            grad_weights = activated.mul_(grad_activated).sum(-1, keepdim=True)
            grad_up.mul_(weights)
            grad_activated.mul_(weights)
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights


def check_sizes(**sizes: int | None) -> None:
    """Refuse a size below 1, by name."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1. Got {size}")


def dense_weights(
    weights_NK: Tensor, indices_NK: Tensor, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """Mixing weights ``[N, E]`` of all experts, zero for those that were not chosen."""
    zeros = weights_NK.new_zeros(len(weights_NK), num_experts)
    return zeros.scatter(1, indices_NK, weights_NK).to(dtype)


def all_products(x_ND: Tensor, weight_EOD: Tensor) -> Tensor:
    """Every expert's ``weight[e] @ x[n]``, ``[E, N, O]``; of few tokens in a batch."""
    if len(x_ND) <= FEW_TOKENS:
        return torch.bmm(x_ND.expand(len(weight_EOD), -1, -1), weight_EOD.transpose(1, 2))
    y_NEO = F.linear(x_ND, weight_EOD.flatten(0, 1)).unflatten(1, weight_EOD.shape[:2])
    return y_NEO.transpose(0, 1)


def sum_of_products(x_ENI: Tensor, weight_EOI: Tensor) -> Tensor:
    """``sum_e weight[e] @ x[e, n]``, ``[N, O]``, by way of whichever is less: every expert's
    products, or a copy of the weights that has experts and inputs side by side."""
    if x_ENI.shape[1] < weight_EOI.shape[2]:
        return torch.bmm(x_ENI, weight_EOI.transpose(1, 2)).sum(0)
    return x_ENI.transpose(0, 1).flatten(1) @ weight_EOI.transpose(1, 2).flatten(0, 1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: that of autocast where it is on, else the tokens' own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
