"""Tokens sorted by expert, and back: each step one pass over memory, also backward.

Shapes: N tokens, D hidden size, E experts, K chosen per token, P rows: the N*K (token, expert)
pairs and those that fill, O and W widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def dispatch(indices_NK: Tensor, num_experts: int, filled: bool = False) -> Dispatch:
    """Sort the (token, expert) pairs by expert, keeping the tokens' order within an expert.

    Args:
        indices_NK: the chosen experts.
        num_experts: E.
        filled: whether every expert's run is filled up to one of :func:`few_lengths`. The rows
            that fill belong to no token's slot; what stands in them is never combined.
    """
    experts_P = indices_NK.reshape(-1)
    sorted_P, order_P = experts_P.sort(stable=True)
    bounds_E = torch.arange(num_experts + 1, device=sorted_P.device)
    starts_E = torch.searchsorted(sorted_P, bounds_E)
    lengths_E = few_lengths(starts_E.diff()) if filled else starts_E.diff()
    ends_E = lengths_E.cumsum(0)
    # A pair moves by as much as the runs before its own were filled up.
    moved_E = ends_E - lengths_E - starts_E[:-1]
    place_P = torch.arange(len(sorted_P), device=sorted_P.device) + moved_E[sorted_P]
    slot_P = torch.empty_like(order_P).scatter_(0, order_P, place_P)
    rows = int(ends_E[-1]) if filled else len(sorted_P)
    token = order_P.new_zeros(rows).scatter_(0, place_P, order_P // indices_NK.shape[1])
    return Dispatch(token, slot_P.view_as(indices_NK), ends_E.to(torch.int32))


def few_lengths(counts: Tensor) -> Tensor:
    """The least numbers of five binary digits, followed by zeros, that are no less than counts: up
    to any length few are different, and none is more than a sixteenth longer."""
    unit = (counts.clamp(min=16).log2().floor() - 4).exp2().long()
    return -(counts // -unit) * unit


class Gather(torch.autograd.Function):
    """``x[token]``, whose gradient is one gather-and-sum pass where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_P: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        return x_ND.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (slot_NK,) = ctx.saved_tensors
        return F.embedding_bag(slot_NK, grad_PD.contiguous(), mode="sum"), None, None


class Sum(torch.autograd.Function):
    """``y[n] = sum_k values[slot[n, k]]``, whose gradient is one gather."""

    @staticmethod
    def forward(ctx: Any, values_PO: Tensor, token_P: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_P)
        return F.embedding_bag(slot_NK, values_PO, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None]:
        return grad_NO.index_select(0, ctx.saved_tensors[0]), None, None


class Unsort(torch.autograd.Function):
    """``rows[slot]``: sorted rows back in the order of tokens and their choices ``[N, K, W]``.

    A row is read at most once, so its gradient is written, not added up; a row that fills gets
    none.
    """

    @staticmethod
    def forward(ctx: Any, rows_PW: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        ctx.rows = len(rows_PW)
        rows = rows_PW.index_select(0, slot_NK.reshape(-1))
        return rows.view(*slot_NK.shape, rows_PW.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_NKW: Tensor) -> tuple[Tensor, None]:
        return sort(grad_NKW, ctx.saved_tensors[0], ctx.rows), None


def sort(values_NKW: Tensor, slot_NK: Tensor, rows: int) -> Tensor:
    """The inverse of :class:`Unsort`: ``[P, W]``, zero in the rows that fill."""
    values = values_NKW.reshape(-1, values_NKW.shape[-1])
    return values.new_zeros(rows, values.shape[1]).index_copy(0, slot_NK.reshape(-1), values)
