"""Reading task JSON, with every problem collected in words a person can act on.

A problem reads `FILE: train[2].output: row 3 has 4 cells, expected 5`; indices count from 0.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiny_onn.arc.grids import MAX_SIDE, NUM_COLOURS, Grid, freeze


class TaskError(ValueError):
    """What is wrong with task data, one line for each problem in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[TaskError], tuple[tuple[str, ...]]]:
        return (TaskError, (self.problems,))


class ParsedTask(NamedTuple):
    """A task as its file holds it, the answers (test outputs, None where hidden) still inside."""

    train: list[tuple[Grid, Grid]]
    test: list[tuple[Grid, Grid | None]]


def show(name: object) -> str:
    """Return a name of the user's for a message: on one line, and printable anywhere."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `; nearest: NAME` for a message, or nothing when no known name is near."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {show(close[0])}" if close else ""


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; TaskError when it cannot be read or is not JSON."""
    where = show(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise TaskError([f"{where}: cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        text = f"{where}: not JSON: byte {error.start} is not UTF-8 text"
        raise TaskError([text]) from error
    except json.JSONDecodeError as error:
        text = f"{where}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        raise TaskError([text]) from error
    except RecursionError as error:
        raise TaskError([f"{where}: not a task: nested too deeply"]) from error
    except ValueError as error:
        raise TaskError([f"{where}: not a task: {show(error)}"]) from error


def parse_grid(value: Any, where: str, problems: list[str]) -> Grid | None:
    """Return the grid in a JSON value, or None with its problems appended to `problems`."""
    found = _shape_problems(value) or _cell_problems(value)
    problems += [f"{where}: {problem}" for problem in found]
    return None if found else freeze(np.array(value, dtype=np.uint8))


def parse_task(raw: Any, file: str, name: str, problems: list[str]) -> ParsedTask | None:
    """Return the task in a JSON value, or None with its problems appended to `problems`.

    `file` and `name` (of the task inside the file, "" when it is the whole file) stand before
    each problem.
    """
    where = f"{file}: {show(name)}" if name else file
    inner = f"{where}." if name else f"{where}: "
    if not isinstance(raw, dict):
        problems.append(f"{where}: is {_kind(raw)}, expected an object with train and test")
        return None
    before = len(problems)
    parts: list[list[tuple[Grid | None, Grid | None]]] = []
    for part in ("train", "test"):
        pairs = raw.get(part)
        if part not in raw:
            problems.append(f"{where}: no {part}")
        elif not isinstance(pairs, list):
            problems.append(f"{inner}{part}: is {_kind(pairs)}, expected a list of pairs")
        elif not pairs:
            problems.append(f"{inner}{part}: is empty, expected at least one pair")
        else:
            at = f"{inner}{part}"
            needs_output = part == "train"
            parts.append(
                [
                    _parse_pair(pair, f"{at}[{i}]", needs_output, problems)
                    for i, pair in enumerate(pairs)
                ]
            )
    if len(problems) > before:
        return None
    return ParsedTask(*parts)  # type: ignore[arg-type]


def parse_answers(
    raw: Any, count: int, where: str, problems: list[str]
) -> list[Grid | None] | None:
    """Return the answers to `count` test inputs from a solutions file's entry (null = hidden).

    None, with its problems appended to `problems`, when the entry is not right.
    """
    before = len(problems)
    grids: list[Grid | None] = []
    if not isinstance(raw, list):
        problems.append(f"{where}: is {_kind(raw)}, expected a list of grids")
    elif len(raw) != count:
        problems.append(f"{where}: {len(raw)} solutions, expected {count} (one per test input)")
    else:
        for i, value in enumerate(raw):
            at = f"{where}[{i}]"
            grids.append(None if value is None else parse_grid(value, at, problems))
    return None if len(problems) > before else grids


def _parse_pair(
    raw: Any, where: str, needs_output: bool, problems: list[str]
) -> tuple[Grid | None, Grid | None]:
    if not isinstance(raw, dict):
        problems.append(f"{where}: is {_kind(raw)}, expected an object with input and output")
        return None, None
    grids: list[Grid | None] = []
    for key, needed in (("input", True), ("output", needs_output)):
        value = raw.get(key)
        if value is None and (needed or key not in raw):
            grids.append(None)
            if needed:
                problems.append(f"{where}: no {key}")
        else:
            grid = None if value is None else parse_grid(value, f"{where}.{key}", problems)
            grids.append(grid)
    return grids[0], grids[1]


def _shape_problems(value: Any) -> list[str]:
    if not isinstance(value, list):
        return [f"is {_kind(value)}, expected a list of rows"]
    if not value:
        return ["empty grid"]
    bad_rows = [
        f"row {r} is {_kind(row)}, expected a list of cells"
        for r, row in enumerate(value)
        if not isinstance(row, list)
    ]
    if bad_rows:
        return _first_of(bad_rows, "rows")
    width = len(value[0])
    found = []
    if len(value) > MAX_SIDE:
        found.append(f"{len(value)} rows, at most {MAX_SIDE} allowed")
    if width > MAX_SIDE:
        found.append(f"{width} columns, at most {MAX_SIDE} allowed")
    if width == 0:
        return [*found, "empty grid: row 0 has no cells"]
    ragged = [
        f"row {r} has {len(row)} cells, expected {width}"
        for r, row in enumerate(value)
        if len(row) != width
    ]
    return found + _first_of(ragged, "rows")


def _cell_problems(rows: list[list[Any]]) -> list[str]:
    # bool is an int to Python: compare types exactly, or `true` would pass for colour 1.
    found = [
        f"row {r}, column {c}: {reprlib.repr(cell)} is not a colour (an integer 0-9)"
        for r, row in enumerate(rows)
        for c, cell in enumerate(row)
        if type(cell) is not int or not 0 <= cell < NUM_COLOURS
    ]
    return _first_of(found, "cells")


def _first_of(found: list[str], what: str) -> list[str]:
    if len(found) < 2:
        return found
    return [f"{found[0]} (and {len(found) - 1} more {what})"]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
