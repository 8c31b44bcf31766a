"""The score: how many tasks have a right answer, for every test input, in two attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from tiny_onn.arc.grids import Grid
from tiny_onn.arc.parsing import show
from tiny_onn.arc.tasks import Answers

ATTEMPTS = 2

Attempts: TypeAlias = Mapping[str, Sequence[Sequence[Grid | None]]]
"""Task id -> one entry per test input -> up to two attempts, best first (None = no grid)."""


@dataclass(frozen=True)
class Score:
    """Counts over the tasks whose answers are all known.

    `tasks`: how many these are. `solved`: tasks of which every test input has a right attempt
    among its two. `solved_at_1`: tasks of which every first attempt is right. `solved_ids`:
    sorted. `test_inputs`, `test_inputs_solved`: the same by test input, with two attempts.
    `hidden`: tasks with a hidden answer; they count nowhere else.
    """

    tasks: int
    solved: int
    solved_at_1: int
    solved_ids: tuple[str, ...]
    test_inputs: int
    test_inputs_solved: int
    hidden: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return {**asdict(self), "solved_ids": list(self.solved_ids)}


def score(attempts: Attempts, answers: Answers) -> Score:
    """Score two attempts per test input, all test inputs of a task together.

    A task without attempts, an attempt that is None and one of another shape are wrong; a third
    attempt is not looked at. Raises ValueError for attempts at a task that is not in `answers`,
    and for a task with another number of test inputs than it has answers.
    """
    unknown = [task_id for task_id in attempts if task_id not in answers]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(f"attempts at a task without answers: {show(unknown[0])}{more}")
    ranks = {
        task_id: _ranks(task_id, attempts.get(task_id), grids) for task_id, grids in answers.items()
    }
    known = {i: r for i, r in ranks.items() if all(grid is not None for grid in answers[i])}
    solved = sorted(i for i, r in known.items() if max(r) < ATTEMPTS)
    by_input = [rank for r in known.values() for rank in r]
    return Score(
        tasks=len(known),
        solved=len(solved),
        solved_at_1=sum(max(r) == 0 for r in known.values()),
        solved_ids=tuple(solved),
        test_inputs=len(by_input),
        test_inputs_solved=sum(rank < ATTEMPTS for rank in by_input),
        hidden=len(answers) - len(known),
    )


def _ranks(
    task_id: str, tries: Sequence[Sequence[Grid | None]] | None, answers: Sequence[Grid | None]
) -> list[int]:
    """Return for each test input the index of the first right attempt, ATTEMPTS when none is."""
    if tries is None:
        return [ATTEMPTS] * len(answers)
    if len(tries) != len(answers):
        text = "task {}: attempts at {} test inputs, expected {}"
        raise ValueError(text.format(show(task_id), len(tries), len(answers)))
    return [_rank(grids, answer) for grids, answer in zip(tries, answers, strict=True)]


def _rank(grids: Sequence[Grid | None], answer: Grid | None) -> int:
    for rank, grid in enumerate(grids[:ATTEMPTS]):
        if grid is not None and answer is not None and np.array_equal(grid, answer):
            return rank
    return ATTEMPTS
