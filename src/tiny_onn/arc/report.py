"""The report of a run: one HTML file that needs nothing else, from the files of the run's folder.

Required are `tasks.json` (Kaggle challenges) and `submission.json`. Read where they are there:
`answers.json` (Kaggle solutions), `splits.json` (`{id: "training" | "evaluation"}`),
`votes.json` (`{id: [[{"grid", "votes"}, ...] per test input]}`, best first; a `share` of all votes
and a `log_prob` in nats are shown, too), `metrics.jsonl`, `routing.json` (see `arc/routes.py`),
`result.json`, `config.toml`. Where `result.json` says how many `views` voted, the votes' shares
follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tiny_onn.arc.charts import CHARTS, history_svg
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.metrics import read_metrics
from tiny_onn.arc.parsing import TaskError, parse_grid, read_json, show
from tiny_onn.arc.report_view import Vote, Votes, header, task_view
from tiny_onn.arc.route_view import RouteView, read_routes
from tiny_onn.arc.scoring import score
from tiny_onn.arc.submission import NO_ATTEMPT, read_submission
from tiny_onn.arc.tasks import TaskSet, load_tasks

REQUIRED = ("tasks.json", "submission.json")
_LARGEST_NUMBER = 1e18


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; what is missing is empty."""

    name: str
    tasks: TaskSet
    attempts: dict[str, list[list[Grid]]]
    splits: dict[str, str]
    votes: Votes
    metrics: list[dict[str, Any]]
    routes: RouteView | None
    result: dict[str, Any]
    config: str


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    The same files give the same report, byte for byte. Raises ValueError, naming the file, when a
    required file is missing or one does not hold what it should.
    """
    text = render(read_run(Path(run)))
    path = Path(run) / "report.html"
    temporary = path.with_name(".report.html.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_run(run: Path) -> RunFiles:
    """Read and check the files of a run's folder; ValueError as for `write_report`."""
    if not run.is_dir():
        raise ValueError(f"{show(run)}: no such folder")
    for name in REQUIRED:
        if not (run / name).is_file():
            needs = " and ".join(REQUIRED)
            raise ValueError(f"{show(run / name)}: no such file; a report needs {needs}")
    answers = run / "answers.json"
    tasks = load_tasks(run / "tasks.json", solutions=answers if answers.is_file() else None)
    attempts = read_submission(run / "submission.json")
    _check_attempts(run / "submission.json", attempts, tasks)
    result = _read_object(run / "result.json")
    config = run / "config.toml"
    return RunFiles(
        name=run.resolve().name,
        tasks=tasks,
        attempts=attempts,
        splits={key: str(value) for key, value in _read_object(run / "splits.json").items()},
        votes=_read_votes(run / "votes.json", tasks, result.get("views")),
        metrics=read_metrics(run / "metrics.jsonl"),
        routes=read_routes(run / "routing.json"),
        result=result,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def render(run: RunFiles) -> str:
    """Return the report's HTML; every text from a file is escaped."""
    tasks = [
        task_view(
            task,
            run.attempts.get(task.id, []),
            run.tasks.answers[task.id],
            run.votes.get(task.id, []),
            run.splits.get(task.id, ""),
        )
        for task in run.tasks
    ]
    environment = Environment(
        loader=PackageLoader("tiny_onn.arc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=run.name,
        header=header(score(run.attempts, run.tasks.answers), tasks, run.result),
        tasks=tasks,
        charts=[Markup(svg) for chart in CHARTS if (svg := history_svg(run.metrics, chart))],
        routes=run.routes,
        config=run.config,
    )


def _check_attempts(path: Path, attempts: Mapping[str, Sequence[object]], tasks: TaskSet) -> None:
    for task_id, entries in attempts.items():
        if task_id not in tasks.ids:
            raise ValueError(f"{show(path)}: task {show(task_id)} is not in tasks.json")
        expected = len(tasks.get(task_id).test)
        if len(entries) != expected:
            text = "{}: {}: attempts at {} test inputs, expected {}"
            raise ValueError(text.format(show(path), show(task_id), len(entries), expected))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{show(path)}: is not a JSON object")
    return value


def _read_votes(path: Path, tasks: TaskSet, views: Any) -> Votes:
    """Read the votes; `views`, how many there were for each test input, gives missing shares."""
    problems: list[str] = []
    total = views if type(views) is int and views > 0 else None
    votes: Votes = {}
    for task_id, entry in _read_object(path).items():
        if task_id not in tasks.ids:
            continue
        where, count = f"{show(path)}: {show(task_id)}", len(tasks.get(task_id).test)
        rows = entry if isinstance(entry, list) else []
        if len(rows) != count or not all(isinstance(row, list) for row in rows):
            problems.append(f"{where}: expected {count} lists of votes, one per test input")
            continue
        votes[task_id] = [
            [_parse_vote(vote, f"{where}[{i}][{j}]", total, problems) for j, vote in enumerate(row)]
            for i, row in enumerate(rows)
        ]
    if problems:
        raise TaskError(problems)
    return votes


def _parse_vote(value: Any, where: str, total: int | None, problems: list[str]) -> Vote:
    entry = value if isinstance(value, dict) else {}
    grid = parse_grid(entry.get("grid"), f"{where}.grid", problems)
    votes, share = _number(entry.get("votes")), _number(entry.get("share"))
    if votes is None:
        problems.append(f"{where}.votes: is not a number")
    if grid is None or votes is None:
        return Vote(NO_ATTEMPT, 0)
    if share is None and total is not None:
        share = votes / total
    return Vote(grid, int(votes), share, _number(entry.get("log_prob")))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < _LARGEST_NUMBER else None
