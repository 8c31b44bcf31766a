"""Views: each has an exact inverse, and the draws are what their seed says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tiny_onn.arc.augment import (
    SYMMETRIES,
    View,
    apply_symmetry,
    free_colours,
    inverse_symmetry,
    sample_view,
    views,
)
from tiny_onn.arc.grids import Grid, as_grid
from tiny_onn.arc.tasks import Pair, Task

sides = st.tuples(st.integers(1, 7), st.integers(1, 7))
grids = arrays(np.uint8, sides, elements=st.integers(0, 9)).map(as_grid)
some_views = st.builds(
    View,
    symmetry=st.integers(0, 7),
    colours=st.permutations(range(10)).map(tuple),
    order=st.permutations(range(4)).map(tuple),
)
few = settings(max_examples=60, deadline=None)


def grid(*rows: list[int]) -> Grid:
    return as_grid(list(rows))


def make_task(task_id: str = "t") -> Task:
    """Colours 0, 1, 2 in inputs, 3 in a test input alone, 7 in outputs alone."""
    train = (
        Pair(grid([0, 1]), grid([7, 1])),
        Pair(grid([2, 0]), grid([0, 7])),
        Pair(grid([1, 1]), grid([2, 2])),
    )
    return Task(task_id, train, (Pair(grid([3, 0]), None),))


def test_each_symmetry_is_what_its_name_says() -> None:
    shown = {
        name: apply_symmetry(grid([1, 2, 3], [4, 5, 6]), s).tolist()
        for s, name in enumerate(SYMMETRIES)
    }
    assert shown == {
        "identity": [[1, 2, 3], [4, 5, 6]],
        "rot90": [[3, 6], [2, 5], [1, 4]],
        "rot180": [[6, 5, 4], [3, 2, 1]],
        "rot270": [[4, 1], [5, 2], [6, 3]],
        "flip_lr": [[3, 2, 1], [6, 5, 4]],
        "flip_ud": [[4, 5, 6], [1, 2, 3]],
        "transpose": [[1, 4], [2, 5], [3, 6]],
        "anti_transpose": [[6, 3], [5, 2], [4, 1]],
    }


@few
@given(grids, st.integers(0, 7))
def test_symmetries_have_inverses_and_give_grids(before: Grid, s: int) -> None:
    after = apply_symmetry(before, s)
    assert after.dtype == np.uint8 and not after.flags.writeable and after.flags.c_contiguous
    assert np.array_equal(apply_symmetry(after, inverse_symmetry(s)), before)


def test_symmetries_are_a_group() -> None:
    marked = grid([1, 2], [3, 4])
    shown = [apply_symmetry(marked, s).tobytes() for s in range(8)]
    assert len(set(shown)) == 8
    twice = {
        apply_symmetry(apply_symmetry(marked, s), t).tobytes() for s in range(8) for t in range(8)
    }
    assert twice == set(shown)


def test_a_symmetry_of_a_writable_array_does_not_share_it() -> None:
    mine = np.array([[1, 2]], dtype=np.uint8)
    shown = apply_symmetry(mine, 0)
    mine[0, 0] = 9
    assert shown.tolist() == [[1, 2]]


@few
@given(grids, some_views)
def test_view_inverts_exactly(before: Grid, view: View) -> None:
    after = view.apply(before)
    assert np.array_equal(view.invert(after), before)
    assert np.array_equal(view.apply(view.invert(before)), before)
    items = ["a", "b", "c", "d"]
    assert view.invert_order(view.apply_order(items)) == tuple(items)
    counts = np.bincount(before.reshape(-1), minlength=10)
    assert np.array_equal(np.bincount(after.reshape(-1), minlength=10)[list(view.colours)], counts)


def test_apply_task_changes_all_grids_and_the_order() -> None:
    task = make_task()
    colours = (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)
    shown = View(symmetry=4, colours=colours, order=(2, 0, 1)).apply_task(task)
    assert [p.input.tolist() for p in shown.train] == [[[2, 2]], [[2, 0]], [[0, 1]]]
    assert [p.output.tolist() for p in shown.train if p.output is not None] == [
        [[1, 1]],
        [[2, 7]],
        [[7, 0]],
    ]
    assert shown.test[0].input.tolist() == [[0, 3]] and shown.test[0].output is None
    assert shown.id == task.id
    same = View().apply_task(task)
    assert all(np.array_equal(a, b) for a, b in zip(same.grids(), task.grids(), strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"symmetry": 8}, "symmetry must be in 0-7. Got 8"),
        ({"symmetry": -1}, "symmetry must be in 0-7. Got -1"),
        ({"colours": (0, 1)}, "colours must be a permutation of 0-9"),
        ({"colours": (0, *range(9))}, "colours must be a permutation of 0-9"),
        ({"order": (0, 2)}, "order must be a permutation of 0-1"),
    ],
)
def test_view_checks_its_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View(**fields)


def test_order_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="order is for 2 pairs. Got 3"):
        View(order=(1, 0)).apply_task(make_task())
    with pytest.raises(ValueError, match="order is for 2 pairs. Got 3"):
        View(order=(1, 0)).invert_order("abc")


def test_free_colours_keep_what_only_outputs_show() -> None:
    task = make_task()
    assert free_colours(task, False) == (0, 1, 2, 3, 4, 5, 6, 8, 9)
    assert free_colours(task, True) == (1, 2, 3, 4, 5, 6, 8, 9)
    seen_in_test = Task("u", task.train, (Pair(grid([7, 3]), None),))
    assert free_colours(seen_in_test, False) == tuple(range(10))


def test_sample_view_keeps_the_fixed_colours_and_reaches_the_rest() -> None:
    task, rng = make_task(), np.random.default_rng(0)
    drawn = [sample_view(rng, task) for _ in range(400)]
    assert {view.colours[0] for view in drawn} == {0}
    assert {view.colours[7] for view in drawn} == {7}
    assert {view.colours[1] for view in drawn} == set(free_colours(task, True))
    assert {view.symmetry for view in drawn} == set(range(8))
    assert len({view.order for view in drawn}) == 6
    moving = [sample_view(rng, task, keep_background=False) for _ in range(400)]
    assert {view.colours[0] for view in moving} == set(free_colours(task, False))


def test_sample_view_switches() -> None:
    rng = np.random.default_rng(0)
    off: dict[str, Any] = {"symmetries": [5], "permute_colours": False, "shuffle_pairs": False}
    assert sample_view(rng, make_task(), **off) == View(symmetry=5)
    again = [sample_view(np.random.default_rng(3), make_task()) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="symmetries must not be empty"):
        sample_view(rng, make_task(), symmetries=[])


def test_views_are_distinct_balanced_and_begin_with_the_symmetries() -> None:
    task = make_task()
    found = views(task, count=43, seed=0)
    assert found[:8] == tuple(View(symmetry=s) for s in range(8))
    # Distinct in what the task shows: its colours are 0, 1, 2, 3 and 7.
    keys = {(v.symmetry, tuple(v.colours[c] for c in (0, 1, 2, 3, 7))) for v in found}
    assert len(found) == len(keys) == 43
    counts = Counter(v.symmetry for v in found)
    assert max(counts.values()) - min(counts.values()) == 1
    assert all(v.colours[7] == 7 and v.colours[0] == 0 and v.order is None for v in found)
    assert views(task, count=20, seed=0) == found[:20]


def test_views_depend_on_task_and_seed_alone() -> None:
    first = views(make_task("a"), count=16, seed=1)
    assert views(make_task("a"), count=16, seed=1) == first
    assert views(make_task("a"), count=16, seed=2) != first
    assert views(make_task("b"), count=16, seed=1) != first


def test_views_are_the_same_in_every_process() -> None:
    code = (
        "from tiny_onn.arc.augment import views; from tiny_onn.arc.tasks import load_tasks;"
        "print(views(load_tasks('arcagi').get('0d3d703e'), count=20, seed=0, shuffle_pairs=True))"
    )
    shown = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        shown.add(run.stdout)
    assert len(shown) == 1


def test_views_end_where_there_are_no_more() -> None:
    # Of the colours shown, 0 and 7 are fixed and 1 is free: eight colours for it.
    task = Task("t", (Pair(grid([0, 1]), grid([7, 1])),), (Pair(grid([0, 1]), None),))
    assert len(views(task, count=1000, seed=0)) == 8 * 8
    assert len(views(task, count=99, seed=0, permute_colours=False)) == 8
    assert len(views(task, count=99, seed=0, symmetries=[0, 3], keep_background=False)) == 99
    pairs = views(make_task(), count=9, seed=0, shuffle_pairs=True)
    assert pairs[0].order is None and all(v.order is not None for v in pairs[1:])
    with pytest.raises(ValueError, match="count must be at least 1. Got 0"):
        views(task, count=0, seed=0)
