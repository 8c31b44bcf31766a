"""The report: right figures, whole and well-formed HTML, nothing outside it, everything escaped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_onn.arc.grids import Grid, as_grid, grid_list
from tiny_onn.arc.report import write_report
from tiny_onn.arc.report_view import duration
from tiny_onn.arc.submission import write_submission
from tiny_onn.arc.tasks import Pair, Task, challenges_json, solutions_json

A, B, C, D = (as_grid([[c, c + 1, 0], [0, c, c]]) for c in (1, 3, 5, 7))
EVIL = "<img src=x onerror=alert(1)>&\"'"
VOID = {"meta", "input", "br", "img", "path", "rect", "circle"}


def task(task_id: str, tests: int = 1) -> Task:
    return Task(task_id, (Pair(A, B), Pair(B, A)), (Pair(C, None),) * tests)


TASKS = [task("a-first"), task("b-second"), task("c-half", 2), task("d-no"), task("e-hidden")]
ANSWERS: dict[str, list[Grid | None]] = {
    "a-first": [D],
    "b-second": [D],
    "c-half": [D, C],
    "d-no": [D],
    "e-hidden": [None],
}
ATTEMPTS: dict[str, list[list[Grid | None]]] = {
    "a-first": [[D, B]],
    "b-second": [[B, D]],
    "c-half": [[D, A], [A, B]],
    "d-no": [[as_grid([[1]])]],
    "e-hidden": [[A, B]],
}
RESULT = {
    "tasks": 4,
    "train_seconds": 483.2,
    "decode_seconds": 41.26,
    "tokens_per_second": 13210.4,
    "parameters": 812345,
    "steps": 2400,
    "views": 32,
    "seed": 7,
    "commit": "abc1234",
    "hardware": {"cpu": "A CPU", "cores": 2, "accelerator": None},
    "versions": {"torch": "2.13.0"},
}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with every file."""
    folder = tmp_path / "some run"
    folder.mkdir()
    write_json(folder / "tasks.json", challenges_json(TASKS))
    write_json(folder / "answers.json", solutions_json(ANSWERS))
    write_submission(folder / "submission.json", ATTEMPTS, TASKS)
    others = [{"grid": [[9]], "votes": 1}, {"grid": [[8]], "votes": 1}]
    first = [{"grid": grid_list(D), "votes": 24, "log_prob": -0.5}, *others]
    write_json(folder / "votes.json", {"a-first": [first], "e-hidden": [[]]})
    write_json(folder / "splits.json", {t.id: "training" for t in TASKS} | {"d-no": "evaluation"})
    write_json(folder / "result.json", RESULT)
    rows = [{"step": i, "loss": 2.0 / i, "tokens": i, "seconds": 1.0} for i in range(1, 6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.toml").write_text('seed = 7\nname = "<i>"\n', encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Collects elements and text; an element that is not closed in order is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def find(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = attributes.items()
        return [found for name, found in self.elements if name == tag and wanted <= found.items()]


def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_headline_and_figures(run: Path) -> None:
    found = page(run)
    for text in (
        "some run",
        "2 of 4 tasks solved",
        "1 at the first attempt",
        "2 of 3 training, 0 of 1 evaluation.",
        "1 more has a hidden answer.",
        "training8 min 3 s",
        "decoding41.3 s",
        "training tokens a second13,210",
        "parameters812,345",
        "processorA CPU",
        "logical cores2",
        "torch2.13.0",
        "seed7",
        'name = "<i>"',
    ):
        assert text in found.text
    assert "accelerator" not in found.text


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, -1, True, "x", None])
def test_a_figure_that_is_no_figure_is_left_out(run: Path, value: Any) -> None:
    keys = ("train_seconds", "decode_seconds", "tokens_per_second", "parameters")
    (run / "result.json").write_text(json.dumps({"steps": 9} | dict.fromkeys(keys, value)))
    found = page(run)
    assert "steps9" in found.text
    assert "training tokens a second" not in found.text and "decoding" not in found.text


def test_every_task_is_listed_and_linked(run: Path) -> None:
    found = page(run)
    states = ["first", "second", "no", "no", "hidden"]
    assert [row["data-state"] for row in found.find("tr") if "data-state" in row] == states
    articles = found.find("article")
    assert [article["data-state"] for article in articles] == states
    targets = {article["id"] for article in articles}
    assert targets == {f"task-{t.id}" for t in TASKS}
    links = [link["href"] for link in found.find("a")]
    assert {link.removeprefix("#") for link in links} == targets
    assert "✗ not solved, 1 of 2 inputs right" in found.text
    for name in ("all", "solved", "unsolved", "hidden"):
        assert len(found.find("input", id=f"show-{name}")) == 1
    assert "all 5 solved 2 not solved 2 hidden 1" in found.text


def test_attempts_are_marked_in_words_with_their_votes(run: Path) -> None:
    found = page(run)
    assert len(found.find("figure", **{"class": "right"})) == 3
    # Two wrong attempts of a, b and d; three of c; two other answers of a.
    assert len(found.find("figure", **{"class": "wrong"})) == 1 + 1 + 3 + 2 + 2
    assert "✓ Attempt 1, right24 votes (75 %), p = 0.61" in found.text
    assert "✗ Attempt 2, wrong4 of 6 cells differ" in found.text
    assert "✗ Attempt 1, wrong1 × 1, expected 2 × 3" in found.text
    assert "✗ Attempt 2, wrongthe same as attempt 1" in found.text
    assert "The next 2 answers" in found.text
    assert found.text.count("Answer, 2 × 3 cells Answer") == 5
    # The only attempts whose answer is hidden carry no mark.
    (hidden,) = re.findall(r"\w+ e-hidden .*", found.text)
    assert "Attempt 1, 2 × 3 cells Attempt 1" in hidden
    assert "✓" not in hidden and "✗" not in hidden


def test_an_attempt_that_no_view_gave_is_said(run: Path) -> None:
    nothing: list[list[Grid | None]] = [[]]
    write_submission(run / "submission.json", ATTEMPTS | {"e-hidden": nothing}, TASKS)
    assert page(run).text.count("no view gave a grid") == 2
    # Without votes the same [[0]] is taken as it is.
    (run / "votes.json").unlink()
    assert "no view gave a grid" not in page(run).text


def test_the_page_needs_nothing_else(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    found = Page(html)
    names = {name for name, _ in found.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "use", "base"}
    attributes = [(key, value) for _, have in found.elements for key, value in have.items()]
    assert not [key for key, _ in attributes if key in ("src", "srcset") or key.startswith("on")]
    assert all(value.startswith("#") for key, value in attributes if key.endswith("href"))
    bare = html.replace("http://www.w3.org/2000/svg", "")
    for text in ("http", "url(", "@import", "//"):
        assert text not in bare.lower()
    assert str(run.parent) not in html


def test_every_text_of_a_file_is_escaped(run: Path) -> None:
    evil = run.with_name("<u>run")
    run.rename(evil)
    tasks = [task(EVIL)]
    write_json(evil / "tasks.json", challenges_json(tasks))
    write_json(evil / "answers.json", {EVIL: [grid_list(D)]})
    write_json(evil / "votes.json", {EVIL: [[{"grid": grid_list(D), "votes": 3}]]})
    write_json(evil / "splits.json", {EVIL: EVIL})
    write_json(evil / "result.json", {"seed": EVIL, "hardware": {EVIL: EVIL, "x": [EVIL]}})
    write_submission(evil / "submission.json", {EVIL: [[D, B]]}, tasks)
    (evil / "config.toml").write_text(f"# {EVIL}</pre>", encoding="utf-8")
    found = page(evil)
    assert not found.find("img") and not found.find("u")
    assert found.text.count(EVIL) == 2 + 1 + 4 + 1
    (article,) = found.find("article")
    assert re.fullmatch(r"task-x[0-9a-f]+", article["id"])
    assert [link["href"] for link in found.find("a")] == ["#" + article["id"]] * 2


def test_optional_files_may_be_missing(run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("tasks.json", "submission.json"):
            path.unlink()
    found = page(run)
    assert "5 tasks answered" in found.text
    assert "answers are hidden, so there is no score" in found.text
    assert {article["data-state"] for article in found.find("article")} == {"hidden"}
    assert "Settings" not in found.text and "Training" not in found.text


def test_tasks_without_attempts_are_shown(run: Path) -> None:
    write_json(run / "submission.json", {})
    found = page(run)
    assert "0 of 4 tasks solved" in found.text
    assert found.text.count("no attempts") == 6


@pytest.mark.parametrize("name", ["tasks.json", "submission.json"])
def test_a_missing_required_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"some run/{name}: no such file; a report needs"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        write_report(tmp_path / "nowhere")


def _set(name: str, value: Any) -> Callable[[Path], None]:
    return lambda run: write_json(run / name, value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_set("result.json", []), r"result\.json: is not a JSON object"),
        (_set("votes.json", {"a-first": []}), r"votes\.json: a-first: expected 1 lists of votes"),
        (
            _set("votes.json", {"a-first": [[{"grid": [[11]], "votes": 1}, 3]]}),
            r"votes\.json: a-first\[0\]\[0\]\.grid: row 0, column 0: 11 is not a colour[^\0]*"
            r"\[0\]\[1\]\.grid: is null[^\0]*\[0\]\[1\]\.votes: is not a number",
        ),
        (
            _set("votes.json", {"a-first": [[{"grid": [[1]], "votes": 10**400}]]}),
            r"votes\.json: a-first\[0\]\[0\]\.votes: is not a number",
        ),
        (
            _set("submission.json", {"c-half": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}),
            r"submission\.json: c-half: attempts at 1 test inputs, expected 2",
        ),
        (
            _set("submission.json", {"z": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}),
            r"submission\.json: task z is not in tasks\.json",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text("x\n{}\n", encoding="utf-8"),
            r"metrics\.jsonl: line 1 is not JSON",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8"),
            r"metrics\.jsonl: line 1 is not an object with a step",
        ),
    ],
)
def test_a_spoilt_file_is_named(run: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(run)
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_a_last_metrics_line_cut_short_is_left_out(run: Path) -> None:
    before = write_report(run).read_bytes()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    assert write_report(run).read_bytes() == before


def test_curves_are_drawn(run: Path) -> None:
    found = page(run)
    assert len(found.find("svg", **{"class": "chart"})) == 1
    assert "Loss (nats per token): training from 2 to 0.4" in found.text


def test_the_same_files_give_the_same_report_and_no_other_file(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == names | {"report.html"}


def test_grids_of_a_task_share_a_scale(run: Path) -> None:
    wide = as_grid(np.zeros((3, 18), dtype=np.uint8))
    tasks = [Task("one", (Pair(wide, A),), (Pair(wide, None),))]
    write_json(run / "tasks.json", challenges_json(tasks))
    write_json(run / "answers.json", {"one": [grid_list(A)]})
    write_submission(run / "submission.json", {"one": [[A, B]]}, tasks)
    widths = {svg["width"] for svg in page(run).find("svg") if "class" not in svg}
    assert widths == {f"{18 * 12 + 2}", f"{3 * 12 + 2}", f"{3 * 12 + 12}"}


def test_durations() -> None:
    seconds = (0.04, 59.94, 59.96, 483.2, 4800)
    words = ["0.0 s", "59.9 s", "1 min 0 s", "8 min 3 s", "1 h 20 min"]
    assert [duration(s) for s in seconds] == words


def test_the_report_needs_no_torch() -> None:
    code = "import sys, tiny_onn.arc.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
