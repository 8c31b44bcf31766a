"""Submission files: complete, in Kaggle's format, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_onn.arc.grids import as_grid
from tiny_onn.arc.submission import read_submission, write_submission
from tiny_onn.arc.tasks import Pair, Task, TaskError

A, B, C = (as_grid([[colour, colour]]) for colour in (1, 2, 3))
PAIR = Pair(A, B)
TASKS = [
    Task("one", (PAIR,), (Pair(A, None),)),
    Task("two", (PAIR,), (Pair(A, None), Pair(B, None))),
]


def test_round_trip(tmp_path: Path) -> None:
    attempts = {"one": [[A, B]], "two": [[B, C], [C, A]]}
    path = tmp_path / "new" / "submission.json"
    write_submission(path, attempts, TASKS)
    assert json.loads(path.read_text())["two"] == [
        {"attempt_1": [[2, 2]], "attempt_2": [[3, 3]]},
        {"attempt_1": [[3, 3]], "attempt_2": [[1, 1]]},
    ]
    found = read_submission(path)
    assert list(found) == ["one", "two"]
    for task_id, tries in attempts.items():
        assert np.array_equal(found[task_id], tries)
    assert os.listdir(path.parent) == ["submission.json"]


def test_every_gap_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    write_submission(path, {"two": [[A], [None, B, C]]}, TASKS)
    assert json.loads(path.read_text()) == {
        "one": [{"attempt_1": [[0]], "attempt_2": [[0]]}],
        "two": [
            {"attempt_1": [[1, 1]], "attempt_2": [[1, 1]]},
            {"attempt_1": [[2, 2]], "attempt_2": [[2, 2]]},
        ],
    }


def test_mistakes_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "submission.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="unknown task ona; nearest: one"):
        write_submission(path, {"ona": [[A]]}, TASKS)
    with pytest.raises(ValueError, match="task two: attempts at 1 test inputs, expected 2"):
        write_submission(path, {"two": [[A]]}, TASKS)
    with pytest.raises(ValueError, match="a grid must hold colours"):
        write_submission(path, {"one": [[np.array([[12]], dtype=np.uint8)]]}, TASKS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_submission(path, {"one": [[A]]}, TASKS)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["submission.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "is not an object of task ids and their attempts"),
        ({"a": []}, "a: expected a list with one object per test input"),
        ({"a": [3]}, "a[0]: expected an object with attempt_1 and attempt_2"),
        ({"a": [{"attempt_1": [[1]]}]}, "a[0]: no attempt_2"),
        (
            {"a": [{"attempt_1": [[1]], "attempt_2": [[1, 2], [3]]}]},
            "a[0].attempt_2: row 1 has 1 cells, expected 2",
        ),
    ],
)
def test_reading_checks(tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TaskError) as caught:
        read_submission(path)
    assert caught.value.problems == (f"{path}: {problem}",)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        read_submission(tmp_path / "none.json")
