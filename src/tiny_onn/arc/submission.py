"""Submission files in Kaggle's format: `{id: [{"attempt_1": grid, "attempt_2": grid}, ...]}`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiny_onn.arc.grids import Grid, as_grid, grid_list
from tiny_onn.arc.parsing import TaskError, nearest, parse_grid, read_json, show
from tiny_onn.arc.scoring import ATTEMPTS, Attempts
from tiny_onn.arc.tasks import Task

KEYS = tuple(f"attempt_{i + 1}" for i in range(ATTEMPTS))
NO_ATTEMPT = as_grid(np.zeros((1, 1), dtype=np.uint8))


def write_submission(path: str | Path, attempts: Attempts, tasks: Iterable[Task]) -> None:
    """Write the attempts for every test input of every task, whole or not at all.

    A missing attempt repeats the first one there is, or is `[[0]]` when there is none: Kaggle
    takes no gaps. Raises ValueError for attempts at a task that is not among `tasks`, for another
    number of test inputs than the task has, and for an attempt that is not a grid.
    """
    tasks = tuple(tasks)
    ids = [task.id for task in tasks]
    for task_id in attempts:
        if task_id not in ids:
            raise ValueError(f"attempts at an unknown task {show(task_id)}{nearest(task_id, ids)}")
    content = {task.id: _entries(task, attempts.get(task.id)) for task in tasks}
    _write_whole(Path(path), json.dumps(content))


def read_submission(path: str | Path) -> dict[str, list[list[Grid]]]:
    """Return the attempts in a submission file: task id -> per test input -> two grids.

    Raises TaskError with every problem of the file.
    """
    path = Path(path)
    where, raw, problems = show(path), read_json(path), list[str]()
    if not isinstance(raw, dict):
        raise TaskError([f"{where}: is not an object of task ids and their attempts"])
    attempts: dict[str, list[list[Grid]]] = {}
    for task_id, entries in raw.items():
        at = f"{where}: {show(task_id)}"
        if not isinstance(entries, list) or not entries:
            problems.append(f"{at}: expected a list with one object per test input")
            continue
        attempts[task_id] = [
            _parse_entry(entry, f"{at}[{i}]", problems) for i, entry in enumerate(entries)
        ]
    if problems:
        raise TaskError(problems)
    return attempts


def _entries(task: Task, tries: Sequence[Sequence[Grid | None]] | None) -> list[dict[str, Any]]:
    if tries is None:
        tries = [()] * len(task.test)
    if len(tries) != len(task.test):
        text = "task {}: attempts at {} test inputs, expected {}"
        raise ValueError(text.format(show(task.id), len(tries), len(task.test)))
    return [dict(zip(KEYS, map(grid_list, _filled(grids)), strict=True)) for grids in tries]


def _filled(grids: Sequence[Grid | None]) -> list[Grid]:
    padded = [*grids[:ATTEMPTS], *[None] * (ATTEMPTS - len(grids))]
    first = next((grid for grid in padded if grid is not None), NO_ATTEMPT)
    return [as_grid(first if grid is None else grid) for grid in padded]


def _parse_entry(entry: Any, where: str, problems: list[str]) -> list[Grid]:
    if not isinstance(entry, dict):
        problems.append(f"{where}: expected an object with {' and '.join(KEYS)}")
        return []
    grids: list[Grid] = []
    for key in KEYS:
        if key not in entry:
            problems.append(f"{where}: no {key}")
            continue
        grid = parse_grid(entry[key], f"{where}.{key}", problems)
        if grid is not None:
            grids.append(grid)
    return grids


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader sees the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
