"""Grids: the one data type that everything in `tiny_onn.arc` handles."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SIDE = 30
NUM_COLOURS = 10

Grid: TypeAlias = NDArray[np.uint8]
"""Colours 0-9, uint8 `[H, W]`, `1 <= H, W <= MAX_SIDE`, read-only."""


def as_grid(value: ArrayLike) -> Grid:
    """Check `value` (`[H, W]`, whole numbers 0-9) and return it as a read-only grid.

    A grid that is read-only already is returned as it is; anything else is copied. Raises
    ValueError when the shape or a value is out of bounds.
    """
    array = np.asarray(value)
    if array.ndim != 2 or not 1 <= min(array.shape) <= max(array.shape) <= MAX_SIDE:
        raise ValueError(
            f"a grid must have shape (H, W) with 1 <= H, W <= {MAX_SIDE}. Got {array.shape}"
        )
    if array.dtype.kind not in "iu":
        raise ValueError(f"a grid must hold integers. Got dtype {array.dtype}")
    if array.max() >= NUM_COLOURS or array.min() < 0:
        raise ValueError(
            f"a grid must hold colours 0-{NUM_COLOURS - 1}. Got {array.min()}-{array.max()}"
        )
    if array.dtype == np.uint8 and not array.flags.writeable and array.flags.c_contiguous:
        return array
    return freeze(np.array(array, dtype=np.uint8, order="C"))


def freeze(array: NDArray[np.uint8]) -> Grid:
    """Make an array of ours read-only, in place, and return it."""
    array.setflags(write=False)
    return array


def grid_list(grid: Grid) -> list[list[int]]:
    """Return the grid as JSON holds it: a list of rows of ints."""
    rows: list[list[int]] = np.asarray(grid).tolist()
    return rows
