"""The score: all test inputs of a task, two attempts each, hidden answers apart."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from tiny_onn.arc.grids import Grid, as_grid
from tiny_onn.arc.scoring import Score, score

A, B, C = (as_grid([[colour, colour]]) for colour in (1, 2, 3))
ANSWERS: dict[str, tuple[Grid | None, ...]] = {"one": (A,), "two": (A, B)}


def test_counts() -> None:
    attempts = {"one": [[A, B]], "two": [[B, A], [B, C]]}
    result = score(attempts, ANSWERS)
    assert result == Score(
        tasks=2,
        solved=2,
        solved_at_1=1,
        solved_ids=("one", "two"),
        test_inputs=3,
        test_inputs_solved=3,
        hidden=0,
    )
    shown = json.loads(json.dumps(result.to_json()))
    assert shown["solved_ids"] == ["one", "two"]
    assert (shown["tasks"], shown["solved"], shown["solved_at_1"]) == (2, 2, 1)


def test_every_test_input_must_be_right() -> None:
    result = score({"two": [[A], [A, C]]}, {"two": (A, B)})
    assert (result.solved, result.solved_at_1, result.solved_ids) == (0, 0, ())
    assert (result.test_inputs, result.test_inputs_solved) == (2, 1)


def test_only_two_attempts_count() -> None:
    assert score({"one": [[B, C, A]]}, {"one": (A,)}).solved == 0
    assert score({"one": [[B, A, C]]}, {"one": (A,)}).solved == 1


@pytest.mark.parametrize("attempts", [{}, {"one": [[]]}, {"one": [[None, None]]}])
def test_missing_attempts_are_wrong(attempts: dict[str, list[list[Grid | None]]]) -> None:
    result = score(attempts, {"one": (A,)})
    assert (result.tasks, result.solved, result.test_inputs) == (1, 0, 1)


def test_a_missing_first_attempt_keeps_its_place() -> None:
    result = score({"one": [[None, A]]}, {"one": (A,)})
    assert (result.solved, result.solved_at_1) == (1, 0)


def test_the_shape_must_be_right() -> None:
    near = [as_grid([[1], [1]]), as_grid([[1]])]
    assert score({"one": [near]}, {"one": (A,)}).solved == 0


def test_hidden_answers_count_nowhere_else() -> None:
    answers = {**ANSWERS, "hidden": (None,), "half": (A, None)}
    attempts = {"one": [[A]], "hidden": [[A]], "half": [[A], [A]]}
    result = score(attempts, answers)
    assert (result.tasks, result.hidden, result.solved) == (2, 2, 1)
    assert (result.test_inputs, result.test_inputs_solved) == (3, 1)
    assert result.solved_ids == ("one",)


def test_nothing_to_score() -> None:
    assert score({}, {}) == Score(0, 0, 0, (), 0, 0, 0)


def test_mismatches_are_errors() -> None:
    with pytest.raises(ValueError, match="task two: attempts at 1 test inputs, expected 2"):
        score({"two": [[A]]}, ANSWERS)
    with pytest.raises(ValueError, match="a task without answers: x "):
        score({"x": [[A]], "y": [[A]]}, ANSWERS)


def test_the_package_gives_the_function_after_the_module_is_imported() -> None:
    import_module("tiny_onn.arc.scoring")
    from tiny_onn.arc import score as public

    assert public is score
