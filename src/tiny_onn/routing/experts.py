"""Experts as stacked matrices, computed as grouped products over tokens sorted by expert.

Shapes: N tokens, D hidden size, E experts, K chosen per token, P = N*K (token, expert) pairs,
I expert width, O output width.

A plain loop over experts is the reference that the tests hold everything here against.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Implementation = Literal["auto", "grouped", "loop"]


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


def grouped_linear(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    """``x[p] @ weight[e(p)].T`` for rows sorted by expert.

    Args:
        x_PD: rows sorted by expert ``[P, D]``, float32 or bfloat16.
        weight_EOD: one matrix per expert ``[E, O, D]``, of the same dtype.
        offsets_E: the end of each expert's run of rows, int32 ``[E]``.
    """
    return F.grouped_mm(x_PD, weight_EOD.transpose(-2, -1), offs=offsets_E)


def loop_linear(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    """The same as :func:`grouped_linear`, one expert after the other, for any dtype and width."""
    runs = x_PD.tensor_split(offsets_E[:-1].tolist())
    return torch.cat([F.linear(run, weight_EOD[e]) for e, run in enumerate(runs)])


def grouped_mm_accepts(dtype: torch.dtype, *widths: int) -> bool:
    """Whether ``grouped_mm`` takes this dtype and these row widths (strides of 16 bytes)."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def row_multiple(rows_per_expert: int, dtype: torch.dtype, device: torch.device) -> int:
    """To what multiple of rows an expert's run is filled up, about a sixteenth of its length.

    On a CPU every bfloat16 product of a new shape is compiled anew (about a millisecond); with
    runs of a few dozen lengths the compiled ones are found again.
    """
    if device.type != "cpu" or dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return 1
    return 1 << max(0, (rows_per_expert // 16).bit_length() - 1)


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
        implementation: ``"grouped"`` (sorted tokens and ``grouped_mm``), ``"loop"`` (any dtype and
            width), or ``"auto"``: grouped wherever ``grouped_mm`` takes the dtype and the widths.
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
        if implementation not in ("auto", "grouped", "loop"):
            raise ValueError(
                f"implementation must be 'auto', 'grouped' or 'loop'. Got {implementation!r}"
            )
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
        linear = self._linear(dtype)
        multiple = row_multiple(indices.numel() // self.num_experts, dtype, x.device)
        plan = dispatch(indices, self.num_experts, 1 if linear is loop_linear else multiple)
        x_PD = _Gather.apply(x.to(dtype), plan.token, plan.slot)
        if self.intermediate_size is None:
            y_PO = linear(x_PD, self.proj.to(dtype), plan.offsets)
        else:
            gate_PI, up_PI = linear(x_PD, self.gate_up_proj.to(dtype), plan.offsets).chunk(2, -1)
            y_PO = linear(F.silu(gate_PI) * up_PI, self.down_proj.to(dtype), plan.offsets)
        return _Combine.apply(y_PO, weights, plan.token, plan.slot)

    def _linear(self, dtype: torch.dtype) -> Any:
        widths = [self.hidden_size, self.output_size, self.intermediate_size or self.hidden_size]
        accepts = grouped_mm_accepts(dtype, *widths)
        if self.implementation == "grouped" and not accepts:
            raise ValueError(
                f"implementation='grouped' needs float32 or bfloat16 and rows of a multiple of 16 "
                f"bytes. Got {dtype} with widths {widths}"
            )
        return grouped_linear if accepts and self.implementation != "loop" else loop_linear

    def extra_repr(self) -> str:
        kind = "linear" if self.intermediate_size is None else f"swiglu {self.intermediate_size}"
        return f"{self.num_experts} x {kind}, {self.hidden_size} -> {self.output_size}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
