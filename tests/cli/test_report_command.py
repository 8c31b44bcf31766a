"""`tiny-onn report`: the path it ends in, and what it says of a folder that is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_onn.arc.grids import as_grid
from tiny_onn.arc.submission import write_submission
from tiny_onn.arc.tasks import Pair, Task, challenges_json
from tiny_onn.cli.main import run

GRID = as_grid([[1, 2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = [Task("one", (Pair(GRID, GRID),), (Pair(GRID, None),))]
    (tmp_path / "tasks.json").write_text(json.dumps(challenges_json(tasks)), encoding="utf-8")
    write_submission(tmp_path / "submission.json", {"one": [[GRID]]}, tasks)
    return tmp_path


def test_it_prints_where_the_report_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<title>{folder.name}: 1 task answered</title>" in html


def test_json_is_the_last_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "result.json").write_text('{"seed": 3, "commit": "abc"}', encoding="utf-8")
    assert run(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(folder / "report.html"),
        "seed": 3,
        "commit": "abc",
        "hardware": None,
        "versions": None,
    }


def test_a_folder_that_is_no_run_is_the_users_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(tmp_path)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    expected = "no such file; a report needs tasks.json and submission.json"
    assert found.err == f"error: {tmp_path / 'tasks.json'}: {expected}\n"
