"""Experts as stacked matrices, computed as grouped products over tokens sorted by expert.

Shapes: N tokens, D hidden size, E experts, K chosen per token, P = N*K (token, expert) pairs,
I expert width, O output width.

A plain loop over experts is the reference that the tests hold everything here against.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.routing.grouped import (
    grouped_linear,
    grouped_mm_accepts,
    loop_linear,
    row_multiple,
)

Implementation = Literal["auto", "grouped", "dense", "loop"]

SMALL_PAIRS, SMALL_BYTES = 128, 1 << 20
"""On a CPU so few (token, expert) products, with weights that fit a cache, are computed for all
experts in less time than sorting the tokens takes."""


class Dispatch(NamedTuple):
    """Where each (token, expert) pair stands once pairs are sorted by expert.

    Attributes:
        token: the token of each sorted pair, int64 ``[P]``.
        slot: the sorted place of each token's k-th pair, int64 ``[N, K]``.
        offsets: the end of each expert's run of pairs, int32 ``[E]``.
    """

    token: Tensor
    slot: Tensor
    offsets: Tensor


def dispatch(indices_NK: Tensor, num_experts: int, multiple: int = 1) -> Dispatch:
    """Sort the (token, expert) pairs by expert, keeping the tokens' order within an expert.

    Args:
        indices_NK: the chosen experts.
        num_experts: E.
        multiple: every expert's run is filled up to a multiple of so many rows. The rows that
            fill belong to no token's slot; what stands in them is never combined.
    """
    experts_P = indices_NK.reshape(-1)
    sorted_P, order_P = experts_P.sort(stable=True)
    bounds_E = torch.arange(num_experts + 1, device=sorted_P.device)
    starts_E = torch.searchsorted(sorted_P, bounds_E)
    filled_E = -(starts_E.diff() // -multiple) * multiple
    ends_E = filled_E.cumsum(0)
    # A pair moves by as much as the runs before its own were filled up.
    moved_E = ends_E - filled_E - starts_E[:-1]
    place_P = torch.arange(len(sorted_P), device=sorted_P.device) + moved_E[sorted_P]
    slot_P = torch.empty_like(order_P).scatter_(0, order_P, place_P)
    rows = len(sorted_P) if multiple == 1 else int(ends_E[-1])
    token = order_P.new_zeros(rows).scatter_(0, place_P, order_P // indices_NK.shape[1])
    return Dispatch(token, slot_P.view_as(indices_NK), ends_E.to(torch.int32))


class _Gather(torch.autograd.Function):
    """``x[token]``, whose gradient is one gather-and-sum pass where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_P: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        return x_ND.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (slot_NK,) = ctx.saved_tensors
        return F.embedding_bag(slot_NK, grad_PD.contiguous(), mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """``y[n] = sum_k weights[n, k] * values[slot[n, k]]``: the mixture of the experts' outputs."""

    @staticmethod
    def forward(
        ctx: Any, values_PO: Tensor, weights_NK: Tensor, token_P: Tensor, slot_NK: Tensor
    ) -> Tensor:
        ctx.wide = weights_NK.dtype
        weights_NK = weights_NK.to(values_PO.dtype)
        ctx.save_for_backward(values_PO, weights_NK, token_P, slot_NK)
        return F.embedding_bag(slot_NK, values_PO, mode="sum", per_sample_weights=weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values_PO, weights_NK, token_P, slot_NK = ctx.saved_tensors
        grad_PO = grad_NO.index_select(0, token_P)
        # The sum is accumulated in float32 whatever the dtype; asking for its result in float32
        # would first copy all of the product.
        grad_weights_P = (values_PO * grad_PO).sum(-1)
        weights_P = torch.zeros_like(token_P, dtype=grad_PO.dtype)
        weights_P.scatter_(0, slot_NK.reshape(-1), weights_NK.reshape(-1))
        return grad_PO.mul_(weights_P[:, None]), grad_weights_P[slot_NK].to(ctx.wide), None, None


class GroupedExperts(nn.Module):
    """E experts in stacked parameters, each token computed by its K chosen ones.

    With ``intermediate_size`` the experts are SwiGLU blocks in the Hugging Face layout:
    ``gate_up_proj [E, 2I, D]`` and ``down_proj [E, D, I]``. Without it they are plain linear maps
    ``proj [E, O, D]``, as the routed query/key/value projections are.

    Args:
        num_experts: E.
        hidden_size: D.
        output_size: O; the hidden size by default.
        intermediate_size: I, or None for plain linear experts.
        implementation: ``"grouped"`` (sorted tokens and ``grouped_mm``), ``"loop"`` (sorted tokens,
            one expert after the other, any dtype and width), ``"dense"`` (all experts for all
            tokens), or ``"auto"``: dense where all experts are chosen or there is next to nothing
            to compute, else grouped wherever ``grouped_mm`` takes the dtype and the widths.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        output_size: int | None = None,
        intermediate_size: int | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        if implementation not in get_args(Implementation):
            known = ", ".join(map(repr, get_args(Implementation)))
            raise ValueError(f"implementation must be one of {known}. Got {implementation!r}")
        names = ("num_experts", "hidden_size", "output_size", "intermediate_size")
        sizes = (num_experts, hidden_size, output_size, intermediate_size)
        for name, size in zip(names, sizes, strict=True):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1. Got {size}")
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.output_size = output_size or hidden_size
        self.intermediate_size = intermediate_size
        self.implementation = implementation
        if intermediate_size is None:
            self.proj = nn.Parameter(torch.empty(num_experts, self.output_size, hidden_size))
        else:
            self.gate_up_proj = nn.Parameter(
                torch.empty(num_experts, 2 * intermediate_size, hidden_size)
            )
            self.down_proj = nn.Parameter(
                torch.empty(num_experts, self.output_size, intermediate_size)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Mix the chosen experts' outputs.

        Args:
            x: tokens ``[N, D]``.
            indices: the chosen experts, int64 ``[N, K]``.
            weights: their mixing weights ``[N, K]``; they carry the router's gradient.

        Returns:
            ``[N, O]`` in the compute dtype (the autocast dtype where autocast is on).
        """
        dtype = _compute_dtype(x)
        implementation = self._implementation_for(indices, dtype, x.device)
        if implementation == "dense":
            return self._dense(x.to(dtype), indices, weights)
        linear, multiple = loop_linear, 1
        if implementation == "grouped":
            linear = grouped_linear
            multiple = row_multiple(indices.numel() // self.num_experts, dtype, x.device)
        plan = dispatch(indices, self.num_experts, multiple)
        x_PD = _Gather.apply(x.to(dtype), plan.token, plan.slot)
        if self.intermediate_size is None:
            y_PO = linear(x_PD, self.proj.to(dtype), plan.offsets)
        else:
            gate_PI, up_PI = linear(x_PD, self.gate_up_proj.to(dtype), plan.offsets).chunk(2, -1)
            y_PO = linear(F.silu(gate_PI) * up_PI, self.down_proj.to(dtype), plan.offsets)
        return _Combine.apply(y_PO, weights, plan.token, plan.slot)

    def _dense(self, x_ND: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Every expert for every token; those that were not chosen weigh nothing."""
        num_tokens, dtype = len(x_ND), x_ND.dtype
        weights_NE = weights.new_zeros(num_tokens, self.num_experts).scatter(1, indices, weights)
        weights_NE = weights_NE.to(dtype)
        if self.intermediate_size is None:
            y_NEO = F.linear(x_ND, self.proj.to(dtype).flatten(0, 1)).unflatten(
                1, (self.num_experts, -1)
            )
            return (weights_NE[:, None] @ y_NEO).squeeze(1)
        gate_up = F.linear(x_ND, self.gate_up_proj.to(dtype).flatten(0, 1))
        gate_NEI, up_NEI = gate_up.unflatten(1, (self.num_experts, -1)).chunk(2, -1)
        act_NEI = F.silu(gate_NEI) * up_NEI * weights_NE[:, :, None]
        return act_NEI.flatten(1) @ self.down_proj.to(dtype).transpose(1, 2).flatten(0, 1)

    def _implementation_for(
        self, indices: Tensor, dtype: torch.dtype, device: torch.device
    ) -> Implementation:
        """The implementation asked for, or the quickest by what ``docs/log.md`` measured."""
        widths = [self.hidden_size, self.output_size, self.intermediate_size or self.hidden_size]
        accepts = grouped_mm_accepts(dtype, *widths)
        if self.implementation == "grouped" and not accepts:
            raise ValueError(
                f"implementation='grouped' needs float32 or bfloat16 and rows of a multiple of 16 "
                f"bytes. Got {dtype} with widths {widths}"
            )
        if self.implementation != "auto":
            return self.implementation
        small = device.type == "cpu" and len(indices) * self.num_experts <= SMALL_PAIRS
        if indices.shape[1] == self.num_experts or (small and self._bytes <= SMALL_BYTES):
            return "dense"
        return "grouped" if accepts else "loop"

    @property
    def _bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.parameters())

    def extra_repr(self) -> str:
        kind = "linear" if self.intermediate_size is None else f"swiglu {self.intermediate_size}"
        return f"{self.num_experts} x {kind}, {self.hidden_size} -> {self.output_size}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
