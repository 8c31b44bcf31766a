"""Row, column and grid of every token, read off the tokens themselves.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(
    input_ids_BT: Tensor,
    *,
    row_end_token_id: int,
    grid_token_ids: Sequence[int],
    blank_token_ids: Sequence[int] = (),
) -> Tensor:
    """Positions ``[3, B, T]`` (row, column, grid) of tokens ``[B, T]``, int64.

    A grid token opens a grid at row 0, column 0. Every other token stands one column after the
    one before it. A row end stands at column 0 of the next row, so that "the next cell" is the
    same step away from every token that predicts one. Blank tokens (padding, the end token) take
    no place: they neither move the column nor count as a grid.
    """
    is_row_end = input_ids_BT == row_end_token_id
    opens_grid = torch.isin(input_ids_BT, input_ids_BT.new_tensor(list(grid_token_ids)))
    is_cell = ~(is_row_end | opens_grid)
    if blank_token_ids:
        is_cell &= torch.isin(
            input_ids_BT, input_ids_BT.new_tensor(list(blank_token_ids)), invert=True
        )
    row = _count_since(is_row_end, opens_grid)
    column = _count_since(is_cell, opens_grid | is_row_end)
    grid = (opens_grid.long().cumsum(-1) - 1).clamp_min(0)
    return torch.stack([row, column, grid])


def _count_since(events_BT: Tensor, resets_BT: Tensor) -> Tensor:
    """How many events there were since the last reset, counting the token itself."""
    count = events_BT.long().cumsum(-1)
    # Counts never fall, so the largest count at a reset so far is the one at the last reset.
    at_reset = torch.where(resets_BT, count, 0).cummax(-1).values
    return count - at_reset
