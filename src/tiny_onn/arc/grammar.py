"""Which tokens may come next while an output grid is written.

Shapes: B sequences, V vocabulary.

A prediction is free in everything but its form: rows of one width, at most 30x30, then the end
token. The true size is never consulted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

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

    @classmethod
    def after(cls, ids_BT: Tensor) -> GridGrammar:
        """The state of sequences ``[B, T]``, each of which is writing the grid that its last OUTPUT
        token has opened.

        Raises:
            ValueError: if one has no OUTPUT token.
        """
        opened = ids_BT == tokens.OUTPUT
        if not bool(opened.any(-1).all()):
            raise ValueError("Every sequence must have an OUTPUT token, which opens the grid")
        # What comes after the last opening, of which so many are still to come at each place.
        written = opened.flip(-1).cumsum(-1).flip(-1) == 0
        row_end = (ids_BT == tokens.ROW_END) & written
        cell = (ids_BT < NUM_COLOURS) & written
        closed = row_end.long().cumsum(-1)
        state = cls(len(ids_BT), ids_BT.device)
        state._rows = closed[:, -1]
        state._column = (cell & (closed == closed[:, -1:])).sum(-1)
        first = (cell & (closed == 0)).sum(-1)
        state._width = torch.where(state._rows > 0, first, 0)
        state.finished = ((ids_BT == tokens.END) & written).any(-1)
        return state

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


class GridLogitsProcessor(LogitsProcessor):
    """For ``model.generate(…, logits_processor=[GridLogitsProcessor()])``: only what can still
    become a rectangular grid of at most 30x30 may come next. Keeps no state, so that beams may be
    reordered."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` with -inf for the tokens that may not follow ``input_ids [B, T]``.

        Raises:
            ValueError: if a sequence has no OUTPUT token.
        """
        allowed = GridGrammar.after(input_ids).allowed()
        rest = scores.shape[-1] - allowed.shape[-1]
        return scores.masked_fill(~F.pad(allowed, (0, rest)), -torch.inf)
