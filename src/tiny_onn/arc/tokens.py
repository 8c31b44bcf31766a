"""Grids as token sequences: a lossless code, its inverse, and where each token stands.

A grid is its rows, each followed by `ROW_END`; a pair is `INPUT rows OUTPUT rows END`.
Legend: `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiny_onn.arc.grids import MAX_SIDE, NUM_COLOURS, Grid, freeze
from tiny_onn.arc.tasks import Pair

ROW_END = 10
INPUT = 11
OUTPUT = 12
END = 13
PAD = 14
VOCAB_SIZE = 16
"""Colours 0-9, the five tokens above, and one unused, so that the size is a power of two."""

Ids = NDArray[np.int64]


def encode_grid(grid: Grid) -> Ids:
    """Return the grid's rows, each closed by ROW_END: int64 `[H * (W + 1)]`."""
    height, width = grid.shape
    rows = np.full((height, width + 1), ROW_END, dtype=np.int64)
    rows[:, :width] = grid
    return rows.reshape(-1)


def encode_prompt(grid: Grid) -> Ids:
    """Return `INPUT rows OUTPUT`, int64 `[T]`: what stands before an answer."""
    return np.concatenate(([INPUT], encode_grid(grid), [OUTPUT]))


def encode_pair(pair: Pair) -> Ids:
    """Return `INPUT rows OUTPUT rows END`, int64 `[T]`; ValueError when the output is hidden."""
    if pair.output is None:
        raise ValueError("a pair whose output is hidden has no tokens. Use encode_prompt")
    return np.concatenate((encode_prompt(pair.input), encode_grid(pair.output), [END]))


def encode_sequence(pairs: Sequence[Pair], query: Grid | None = None) -> Ids:
    """Return the tokens of several pairs and then, with a query, its prompt: int64 `[T]`."""
    parts = [encode_pair(pair) for pair in pairs]
    if query is not None:
        parts.append(encode_prompt(query))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def pair_tokens(pair: Pair) -> int:
    """Return the number of tokens of a pair, or of its prompt when the output is hidden."""
    prompt = 1 + _grid_tokens(pair.input) + 1
    return prompt if pair.output is None else prompt + _grid_tokens(pair.output) + 1


def _grid_tokens(grid: Grid) -> int:
    height, width = grid.shape
    return int(height * (width + 1))


def decode_grid(ids: ArrayLike) -> Grid | None:
    """Read the rows up to the first END, or return None where they are not a grid.

    None for a ragged, empty or unfinished grid (no END, or a last row that is not closed), one
    with more than 30 rows or columns, or one with any other token in it. Nothing is repaired: an
    invalid prediction stays one. `ids`: integers `[T]`; what follows END is not read.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    ends = np.flatnonzero(tokens == END)
    if not len(ends):
        return None
    body = tokens[: ends[0]]
    row_ends = np.flatnonzero(body == ROW_END)
    height = len(row_ends)
    if not 1 <= height <= MAX_SIDE:
        return None
    width = int(row_ends[0])
    if not 1 <= width <= MAX_SIDE or len(body) != height * (width + 1):
        return None
    cells = body.reshape(height, width + 1)[:, :width]
    # There are `height` row ends: if no cell is one, each row is closed by one.
    if cells.min() < 0 or cells.max() >= NUM_COLOURS:
        return None
    return freeze(cells.astype(np.uint8))


def grid_positions(ids: ArrayLike) -> NDArray[np.int64]:
    """Return (row, column, grid) of every token, int64 `[T, 3]`.

    The plain reference for the model's own version. A marker (INPUT, OUTPUT) stands at (0, 0) and
    starts a grid, the k-th marker (from 0) grid k. A cell stands one column after the token
    before it. The ROW_END of row r stands at (r + 1, 0): it marks the row to come, so that the
    next cell is always the same step away. END stands where the token before it stands. PAD gets
    (0, 0, 0) and does not count.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    positions = np.zeros((len(tokens), 3), dtype=np.int64)
    row, column, grid = 0, 0, -1
    for t, token in enumerate(tokens.tolist()):
        if token == PAD:
            continue
        if token in (INPUT, OUTPUT):
            row, column, grid = 0, 0, grid + 1
        elif token == ROW_END:
            row, column = row + 1, 0
        elif token != END:
            column += 1
        positions[t] = row, column, max(grid, 0)
    return positions


def output_mask(ids: ArrayLike) -> NDArray[np.bool_]:
    """Return bool `[T]`, True at what the loss predicts: after each OUTPUT, up to its END.

    The demonstrations' outputs all count, not only the last one (H1). OUTPUT itself is given, and
    PAD is never predicted.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    mask = np.zeros(len(tokens), dtype=np.bool_)
    inside = False
    for t, token in enumerate(tokens.tolist()):
        if token in (INPUT, OUTPUT):
            inside = token == OUTPUT
        elif token != PAD:
            mask[t] = inside
            inside = inside and token != END
    return mask
