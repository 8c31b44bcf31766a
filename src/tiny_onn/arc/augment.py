"""Views of a task: the square's eight symmetries, colour permutations, the order of the pairs.

Every view has an exact inverse, so that a prediction made in one can be read in the task's own
frame. The draws come from a `numpy.random.Generator`, and from the task's id for decoding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from tiny_onn.arc.grids import NUM_COLOURS, Grid, as_grid, freeze
from tiny_onn.arc.tasks import Pair, Task

Item = TypeVar("Item")

SYMMETRIES = (
    "identity",
    "rot90",
    "rot180",
    "rot270",
    "flip_lr",
    "flip_ud",
    "transpose",
    "anti_transpose",
)
"""Rotations are counter-clockwise, by degrees; `flip_lr` swaps left and right."""

_INVERSES = (0, 3, 2, 1, 4, 5, 6, 7)
IDENTITY_COLOURS = tuple(range(NUM_COLOURS))


def apply_symmetry(grid: Grid, symmetry: int) -> Grid:
    """Return the grid `[H, W]` under `SYMMETRIES[symmetry]`: `[H, W]` or `[W, H]`, read-only."""
    _check_symmetry(symmetry)
    grid = as_grid(grid)
    if symmetry < 4:
        turned = np.rot90(grid, symmetry)
    elif symmetry < 6:
        turned = grid[:, ::-1] if symmetry == 4 else grid[::-1]
    else:
        turned = grid.T if symmetry == 6 else grid[::-1, ::-1].T
    return freeze(np.ascontiguousarray(turned))


def inverse_symmetry(symmetry: int) -> int:
    """Return the index of the symmetry that undoes this one."""
    _check_symmetry(symmetry)
    return _INVERSES[symmetry]


@dataclass(frozen=True)
class View:
    """One way of looking at a task; the default view changes nothing.

    `symmetry`: index into SYMMETRIES. `colours`: a permutation of 0-9, new = colours[old].
    `order`: a permutation of the demonstrations, the i-th of the view is `train[order[i]]`; None
    keeps them as they are. Raises ValueError when a field is none of these.
    """

    symmetry: int = 0
    colours: tuple[int, ...] = IDENTITY_COLOURS
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_symmetry(self.symmetry)
        if sorted(self.colours) != list(IDENTITY_COLOURS):
            raise ValueError(f"colours must be a permutation of 0-9. Got {self.colours}")
        if self.order is not None and sorted(self.order) != list(range(len(self.order))):
            last = len(self.order) - 1
            raise ValueError(f"order must be a permutation of 0-{last}. Got {self.order}")

    def apply(self, grid: Grid) -> Grid:
        """Return the grid as this view shows it."""
        palette = np.array(self.colours, dtype=np.uint8)
        return freeze(palette[apply_symmetry(grid, self.symmetry)])

    def invert(self, grid: Grid) -> Grid:
        """Return the grid that this view shows as `grid`: the exact inverse of `apply`."""
        palette = np.argsort(self.colours).astype(np.uint8)
        return freeze(palette[apply_symmetry(grid, inverse_symmetry(self.symmetry))])

    def apply_order(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """Return the items, one per demonstration, in this view's order."""
        if self.order is None:
            return tuple(items)
        _check_count(self.order, items)
        return tuple(items[i] for i in self.order)

    def invert_order(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """Return items in this view's order in the task's own: the inverse of `apply_order`."""
        if self.order is None:
            return tuple(items)
        _check_count(self.order, items)
        return tuple(items[int(i)] for i in np.argsort(self.order))

    def apply_task(self, task: Task) -> Task:
        """Return the task, under the same id, as this view shows it."""
        train = self.apply_order([self._pair(pair) for pair in task.train])
        return Task(task.id, train, tuple(self._pair(pair) for pair in task.test))

    def _pair(self, pair: Pair) -> Pair:
        output = None if pair.output is None else self.apply(pair.output)
        return Pair(self.apply(pair.input), output)


@lru_cache(maxsize=4096)
def free_colours(task: Task, keep_background: bool) -> tuple[int, ...]:
    """Return the colours, in order, that may be permuted among themselves.

    All ten, less those that appear in outputs but in no input (nothing in a test input would say
    what they became), less 0 with `keep_background`.
    """
    outputs = _colours(pair.output for pair in task.train if pair.output is not None)
    inputs = _colours(pair.input for pair in task.train + task.test)
    fixed = (outputs - inputs) | ({0} if keep_background else set())
    return tuple(colour for colour in range(NUM_COLOURS) if colour not in fixed)


def sample_view(
    rng: np.random.Generator,
    task: Task,
    *,
    symmetries: Sequence[int] = range(len(SYMMETRIES)),
    permute_colours: bool = True,
    keep_background: bool = True,
    shuffle_pairs: bool = True,
) -> View:
    """Draw a view of the task for training; the same generator state gives the same view."""
    _check_symmetries(symmetries)
    symmetry = int(symmetries[int(rng.integers(len(symmetries)))])
    colours = IDENTITY_COLOURS
    if permute_colours:
        colours = _permuted(rng, free_colours(task, keep_background))
    order = _shuffled(rng, range(len(task.train))) if shuffle_pairs else None
    return View(symmetry, colours, order)


def views(
    task: Task,
    *,
    count: int,
    seed: int,
    symmetries: Sequence[int] = range(len(SYMMETRIES)),
    permute_colours: bool = True,
    keep_background: bool = True,
    shuffle_pairs: bool = False,
) -> tuple[View, ...]:
    """Return `count` distinct views for decoding, fewer where the task has no more.

    First the symmetries with the colours as they are, then rounds over the symmetries with random
    colours, so that no symmetry has more than one view more than another. Two views are distinct
    when their symmetry differs, or the colour of anything that appears in the task. The result
    depends on `task.id` (by CRC-32), `seed` and the task's colours, not on what was drawn before;
    a larger `count` begins with the views of a smaller one.
    """
    _check_symmetries(symmetries)
    if count < 1:
        raise ValueError(f"count must be at least 1. Got {count}")
    rng = np.random.default_rng([zlib.crc32(task.id.encode("utf-8", "surrogatepass")), seed])
    free = free_colours(task, keep_background) if permute_colours else ()
    seen = sorted(_colours(task.grids()))
    distinct = math.perm(len(free), len(set(free) & set(seen)))
    used: dict[int, set[tuple[int, ...]]] = {s: set() for s in dict.fromkeys(symmetries)}
    found: list[View] = []
    for index in range(min(count, distinct * len(used))):
        symmetry = list(used)[index % len(used)]
        colours = IDENTITY_COLOURS
        while (key := tuple(colours[c] for c in seen)) in used[symmetry]:
            colours = _permuted(rng, free)
        used[symmetry].add(key)
        order = _shuffled(rng, range(len(task.train))) if shuffle_pairs and index else None
        found.append(View(int(symmetry), colours, order))
    return tuple(found)


def _colours(grids: Iterable[Grid]) -> set[int]:
    found: set[int] = set()
    for grid in grids:
        found.update(np.unique(grid).tolist())
    return found


def _permuted(rng: np.random.Generator, free: Sequence[int]) -> tuple[int, ...]:
    colours = list(IDENTITY_COLOURS)
    for old, new in zip(free, _shuffled(rng, free), strict=True):
        colours[old] = new
    return tuple(colours)


def _shuffled(rng: np.random.Generator, items: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in rng.permutation(np.array(items, dtype=np.int64)))


def _check_symmetry(symmetry: int) -> None:
    if not 0 <= symmetry < len(SYMMETRIES):
        raise ValueError(f"symmetry must be in 0-{len(SYMMETRIES) - 1}. Got {symmetry}")


def _check_symmetries(symmetries: Sequence[int]) -> None:
    if not len(symmetries):
        raise ValueError("symmetries must not be empty. [0] is the identity alone")
    for symmetry in symmetries:
        _check_symmetry(symmetry)


def _check_count(order: Sequence[int], items: Sequence[object]) -> None:
    if len(items) != len(order):
        raise ValueError(f"order is for {len(order)} pairs. Got {len(items)}")
