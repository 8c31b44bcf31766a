"""Which tokens may come next while an output grid is written.

Shapes: B sequences, V vocabulary.

A prediction is free in everything but its form: rows of one width, at most 30x30, then the end
token. The true size is never consulted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn.arc import tokens
from tiny_onn.arc.grids import MAX_SIDE, NUM_COLOURS


class GridGrammar:
    """The state of B grids being written, one token at a time.

    Attributes:
        finished: bool ``[B]``, whether the end token has been written.
    """

    def __init__(self, batch: int, device: torch.device | str = "cpu") -> None:
        self._rows = torch.zeros(batch, dtype=torch.long, device=device)
        self._column = torch.zeros_like(self._rows)
        self._width = torch.zeros_like(self._rows)  # 0 until the first row is closed
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def allowed(self) -> Tensor:
        """Bool ``[B, V]``: the tokens that can still become a rectangular grid; a finished
        sequence may only be padded."""
        first = self._width == 0
        full_row = self._column == torch.where(first, MAX_SIDE, self._width)
        starts_row = self._column == 0
        full_grid = self._rows == MAX_SIDE
        allowed = self.finished.new_zeros(len(self._rows), tokens.VOCAB_SIZE)
        allowed[:, :NUM_COLOURS] = ~(full_row | (full_grid & starts_row))[:, None]
        allowed[:, tokens.ROW_END] = torch.where(first, ~starts_row, full_row)
        allowed[:, tokens.END] = starts_row & (self._rows > 0)
        allowed[self.finished] = False
        allowed[:, tokens.PAD] = self.finished
        return allowed

    def advance(self, token_B: Tensor) -> None:
        """Write one token to each sequence; it must be an allowed one."""
        row_end = token_B == tokens.ROW_END
        self._width = torch.where(row_end & (self._width == 0), self._column, self._width)
        self._rows = self._rows + row_end
        cell = token_B < NUM_COLOURS
        self._column = torch.where(row_end, 0, self._column + cell)
        self.finished = self.finished | (token_B == tokens.END)

    def keep(self, index: Tensor) -> None:
        """Go on with these sequences only, in this order."""
        self._rows, self._column = self._rows[index], self._column[index]
        self._width, self.finished = self._width[index], self.finished[index]
