"""Row, column and grid of every token, read off the tokens themselves, and the rotation by them.

Shapes: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig


def grid_positions(
    input_ids_BT: Tensor,
    *,
    row_end_token_id: int,
    grid_token_ids: Sequence[int],
    blank_token_ids: Sequence[int] = (),
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """Positions ``[3, B, T]`` (row, column, grid) of tokens ``[B, T]``, int64.

    A grid token opens a grid at row 0, column 0. Every other token stands one column after the
    one before it. A row end stands at column 0 of the next row, so that "the next cell" is the
    same step away from every token that predicts one. Blank tokens (padding, the end token) take
    no place: they neither move the column nor count as a grid.

    Args:
        segment_ids_BT: the sequence each token of a packed row belongs to; positions start again
            where it changes.
    """
    is_row_end = input_ids_BT == row_end_token_id
    opens_grid = torch.isin(input_ids_BT, input_ids_BT.new_tensor(list(grid_token_ids)))
    is_cell = ~(is_row_end | opens_grid)
    if blank_token_ids:
        is_cell &= torch.isin(
            input_ids_BT, input_ids_BT.new_tensor(list(blank_token_ids)), invert=True
        )
    starts = None if segment_ids_BT is None else _starts(segment_ids_BT)
    row = _count_since(is_row_end, opens_grid, starts)
    column = _count_since(is_cell, opens_grid | is_row_end, starts)
    grid = (_count_since(opens_grid, None, starts) - 1).clamp_min(0)
    return torch.stack([row, column, grid])


def _starts(segment_ids_BT: Tensor) -> Tensor:
    """Where a packed sequence begins, bool; the row's own beginning needs no mark."""
    starts = torch.zeros_like(segment_ids_BT, dtype=torch.bool)
    starts[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return starts


def _count_since(events_BT: Tensor, resets_BT: Tensor | None, starts_BT: Tensor | None) -> Tensor:
    """How many events there were since the last reset or start, counting the token itself; the
    event of a resetting token is forgotten, that of a starting token counts."""
    count = events_BT.long().cumsum(-1)
    # Counts never fall, so the largest base so far is the one of the last reset or start.
    base = torch.zeros_like(count)
    if starts_BT is not None:
        base = torch.where(starts_BT, count - events_BT.long(), base)
    if resets_BT is not None:
        base = torch.where(resets_BT, count, base)
    return count - base.cummax(-1).values


def rotate(x_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of the heads by the angles of its token."""
    cos, sin = (angles[:, None].to(x_BHTC.dtype) for angles in (cos_BTC, sin_BTC))
    if torch.compiler.is_compiling():
        first, second = x_BHTC.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return _Rotate.apply(x_BHTC, cos, sin)


class _Rotate(torch.autograd.Function):
    """The rotation, written straight to its place; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    turned = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    new_first, new_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=sign)
    return turned


class TinyOnnRotaryEmbedding(nn.Module):
    """Cosines and sines ``[B, T, C/2]`` of positions along one axis or three.

    With ``position_type="grid"`` the C/2 rotated pairs are divided among row, column and grid in
    the ratio 3 : 3 : 2, each with its own geometric ladder of frequencies.
    """

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__()
        pairs = config.head_width // 2
        along = max(1, pairs * 3 // 8)
        grid = config.position_type == "grid"
        self.pairs_per_axis = (along, along, pairs - 2 * along) if grid else (pairs,)
        self.theta = config.rope_theta

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Angles for positions ``[axes, B, T]``."""
        angles = [
            position[..., None].float() * self._frequencies(pairs, position.device)
            for position, pairs in zip(position_ids, self.pairs_per_axis, strict=True)
        ]
        angles_BTC = torch.cat(angles, dim=-1)
        return angles_BTC.cos().to(dtype), angles_BTC.sin().to(dtype)

    def _frequencies(self, pairs: int, device: torch.device) -> Tensor:
        return self.theta ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
