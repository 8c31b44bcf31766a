"""What the report shows of each task and of the run as a whole, ready for the template."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from markupsafe import Markup

from tiny_onn.arc.draw import Mark, cell_size, grid_svg
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.scoring import Score, score
from tiny_onn.arc.submission import NO_ATTEMPT
from tiny_onn.arc.tasks import Task

State = Literal["first", "second", "no", "hidden"]
STATES: dict[State, str] = {
    "first": "solved, attempt 1",
    "second": "solved, attempt 2",
    "no": "not solved",
    "hidden": "answer hidden",
}
OTHERS_SHOWN = 4
_LARGEST_FIGURE = 1e18


@dataclass(frozen=True)
class Vote:
    """An answer that `votes` views gave: `share` (0-1) of all; `log_prob` in nats; if known."""

    grid: Grid
    votes: int
    share: float | None = None
    log_prob: float | None = None


Votes: TypeAlias = dict[str, list[list[Vote]]]
"""Task id -> per test input -> its answers, best first."""


@dataclass(frozen=True)
class Figure:
    """A drawn grid (None: there is none) with the lines that stand under it."""

    svg: Markup | None
    caption: str
    notes: tuple[str, ...] = ()
    mark: Mark | None = None


@dataclass(frozen=True)
class TestView:
    """A test input, the attempts at it, the answer where known, and the next answers by votes."""

    __test__ = False

    name: str
    input: Figure
    attempts: list[Figure]
    answer: Figure | None
    others: list[Figure]


@dataclass(frozen=True)
class TaskView:
    """A task: `state` is how it ended, `detail` says so in words."""

    id: str
    anchor: str
    split: str
    state: State
    detail: str
    demonstrations: list[tuple[Figure, Figure]]
    tests: list[TestView]


@dataclass(frozen=True)
class Header:
    """The figures at the top, and the facts (name, value) about the run at the end."""

    score: Score
    counts: dict[State, int]
    splits: list[tuple[str, int, int]]
    figures: list[tuple[str, str]]
    facts: list[tuple[str, str]]


def task_view(
    task: Task,
    attempts: Sequence[Sequence[Grid]],
    answers: Sequence[Grid | None],
    votes: Sequence[Sequence[Vote]],
    split: str,
) -> TaskView:
    """Draw a task's grids, all at one scale, and say how it ended."""
    outputs = [pair.output for pair in task.train if pair.output is not None]
    known = [grid for grid in answers if grid is not None]
    cell = cell_size(*(pair.input for pair in task.train + task.test), *outputs, *known)
    result = score({task.id: attempts} if attempts else {}, {task.id: answers})
    tests = [
        _test_view(task, i, attempts[i] if attempts else (), answers[i], votes[i : i + 1], cell)
        for i in range(len(task.test))
    ]
    demonstrations = []
    for number, (pair, output) in enumerate(zip(task.train, outputs, strict=True), start=1):
        names = (f"Input {number}", f"Output {number}")
        before, after = (
            _figure(g, n, cell) for g, n in zip((pair.input, output), names, strict=True)
        )
        demonstrations.append((before, after))
    state = _state(result)
    return TaskView(
        id=task.id,
        anchor=_anchor(task.id),
        split=split,
        state=state,
        detail=_detail(state, result),
        demonstrations=demonstrations,
        tests=tests,
    )


def _anchor(task_id: str) -> str:
    """A fragment for links: the id where it is a plain word, else its bytes."""
    plain = re.fullmatch(r"[\w.-]+", task_id, re.ASCII)
    return "task-" + (task_id if plain else "x" + task_id.encode(errors="replace").hex())


def _state(result: Score) -> State:
    if result.hidden:
        return "hidden"
    if result.solved_at_1:
        return "first"
    return "second" if result.solved else "no"


def _detail(state: State, result: Score) -> str:
    if state == "no" and result.test_inputs > 1:
        return f"{STATES[state]}, {result.test_inputs_solved} of {result.test_inputs} inputs right"
    return STATES[state]


def _test_view(
    task: Task,
    index: int,
    attempts: Sequence[Grid],
    answer: Grid | None,
    votes: Sequence[Sequence[Vote]],
    cell: int,
) -> TestView:
    name = f"Test {index + 1}" if len(task.test) > 1 else "Test"
    found = votes[0] if votes else None
    figures = [
        _attempt(rank, attempts, answer, found, cell) for rank in range(1, len(attempts) + 1)
    ]
    others = [v for v in found or () if not any(np.array_equal(v.grid, g) for g in attempts)]
    return TestView(
        name=name,
        input=_figure(task.test[index].input, "Input", cell),
        attempts=figures,
        answer=None if answer is None else _figure(answer, "Answer", cell),
        others=[
            _figure(vote.grid, _votes(vote), cell, mark=_mark(vote.grid, answer))
            for vote in others[:OTHERS_SHOWN]
        ],
    )


def _attempt(
    rank: int,
    attempts: Sequence[Grid],
    answer: Grid | None,
    votes: Sequence[Vote] | None,
    cell: int,
) -> Figure:
    grid, caption = attempts[rank - 1], f"Attempt {rank}"
    vote = next((v for v in votes or () if np.array_equal(v.grid, grid)), None)
    if votes is not None and vote is None and np.array_equal(grid, NO_ATTEMPT):
        return Figure(None, caption, ("no view gave a grid",), None if answer is None else "wrong")
    notes = [_votes(vote)] if vote else []
    if rank > 1 and np.array_equal(grid, attempts[0]):
        notes = ["the same as attempt 1"]
    if answer is not None:
        notes += _difference(grid, answer)
    return _figure(grid, caption, cell, tuple(notes), _mark(grid, answer))


def _votes(vote: Vote) -> str:
    text = f"{vote.votes:,} vote{'' if vote.votes == 1 else 's'}"
    if vote.share is not None:
        text += f" ({100 * vote.share:.0f} %)"
    if vote.log_prob is not None:
        text += f", p = {math.exp(min(vote.log_prob, 0.0)):.2g}"
    return text


def _mark(grid: Grid, answer: Grid | None) -> Mark | None:
    if answer is None:
        return None
    return "right" if np.array_equal(grid, answer) else "wrong"


def _difference(grid: Grid, answer: Grid) -> list[str]:
    if grid.shape != answer.shape:
        return [f"{_size(grid)}, expected {_size(answer)}"]
    wrong = int((grid != answer).sum())
    return [f"{wrong} of {grid.size} cells differ"] if wrong else []


def _size(grid: Grid) -> str:
    return f"{grid.shape[0]} × {grid.shape[1]}"


def _figure(
    grid: Grid, caption: str, cell: int, notes: tuple[str, ...] = (), mark: Mark | None = None
) -> Figure:
    title = f"{caption}, {_size(grid)} cells"
    return Figure(Markup(grid_svg(grid, cell=cell, title=title, mark=mark)), caption, notes, mark)


def header(result: Score, tasks: Sequence[TaskView], run: Mapping[str, Any]) -> Header:
    """Sum up a run: `result` is its score, `run` the object in its `result.json`, if any."""
    counts: dict[State, int] = {
        state: sum(task.state == state for task in tasks) for state in STATES
    }
    return Header(
        score=result,
        counts=counts,
        splits=list(_by_split(tasks)),
        figures=list(_figures(run)),
        facts=[fact for key in FACTS if key in run for fact in _facts(key, run[key])],
    )


FACTS = ("seed", "commit", "hardware", "versions")
NAMES = {"cpu": "processor", "cores": "logical cores", "memory_gib": "memory, GiB"}


def _by_split(tasks: Sequence[TaskView]) -> Iterator[tuple[str, int, int]]:
    """Yield (split, solved, tasks with known answers), where there are several, all known."""
    names = list(dict.fromkeys(task.split for task in tasks))
    if len(names) < 2 or "" in names:
        return
    for name in names:
        states = [task.state for task in tasks if task.split == name and task.state != "hidden"]
        yield name, sum(state in ("first", "second") for state in states), len(states)


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = (
        ("train_seconds", "training", duration),
        ("decode_seconds", "decoding", duration),
        ("tokens_per_second", "training tokens a second", lambda n: f"{n:,.0f}"),
        ("parameters", "parameters", lambda n: f"{n:,.0f}"),
        ("steps", "steps", lambda n: f"{n:,.0f}"),
    )
    for key, name, form in shown:
        value = run.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if 0 <= value < _LARGEST_FIGURE:
            yield name, form(value)


def duration(seconds: float) -> str:
    """Return a time in words: `42.3 s`, `8 min 3 s`, `1 h 20 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _facts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of a value, one for each entry of an object."""
    name = NAMES.get(key, key.replace("_", " "))
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _facts(f"{inner}", item)
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, str(value)
