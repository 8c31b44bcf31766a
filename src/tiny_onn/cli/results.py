"""What a finished run leaves in its folder, and the table it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tiny_onn.arc.draw import print_task
from tiny_onn.arc.scoring import Score
from tiny_onn.arc.solving import Solution
from tiny_onn.arc.submission import write_submission
from tiny_onn.arc.tasks import TaskSet, challenges_json, solutions_json

DRAWN = 6
"""How many tasks are drawn in the terminal; the report has them all."""


def write_tasks(out: Path, tasks: TaskSet, config_toml: str) -> None:
    """Write what a run is about to do: ``config.toml``, ``tasks.json`` and ``answers.json``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(config_toml, encoding="utf-8")
    _write_json(out / "tasks.json", challenges_json(tasks))
    _write_json(out / "answers.json", solutions_json(tasks.answers))
    _write_json(out / "splits.json", tasks.splits)


def write_results(out: Path, tasks: TaskSet, solution: Solution, result: dict[str, Any]) -> None:
    """Write what a run found: ``submission.json``, ``votes.json`` and ``result.json``."""
    write_submission(out / "submission.json", solution.attempts, tasks)
    votes = {
        key: [
            [
                {"grid": c.grid.tolist(), "votes": c.votes, "log_prob": round(c.log_prob, 3)}
                for c in candidates[:5]
            ]
            for candidates in tests
        ]
        for key, tests in solution.candidates.items()
    }
    _write_json(out / "votes.json", votes)
    _write_json(out / "result.json", result)


def print_results(console: Console, tasks: TaskSet, solution: Solution, found: Score) -> None:
    """Draw some solved tasks, then a table of all tasks, then the headline."""
    for key in found.solved_ids[:DRAWN]:
        print_task(console, tasks.get(key), tasks.answers.get(key), solution.attempts[key])
    table = Table(title="tasks", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "split", "test inputs", "result", "votes"):
        table.add_column(column)
    for task in tasks:
        table.add_row(
            task.id,
            tasks.splits.get(task.id, "-"),
            str(len(task.test)),
            _verdict(task.id, tasks, found),
            _votes(solution, task.id),
        )
    console.print(table)
    console.print(headline(tasks, found))


def headline(tasks: TaskSet, found: Score) -> str:
    """The result in one or two sentences."""
    if not found.tasks:
        return f"{found.hidden} tasks answered; the answers are hidden, so there is no score."
    text = (
        f"solved {found.solved} of {found.tasks} tasks with two attempts "
        f"({found.solved_at_1} with the first)"
    )
    parts = [
        f"{sum(tasks.splits.get(i) == split for i in found.solved_ids)} of {total} {split}"
        for split, total in _split_sizes(tasks).items()
    ]
    text += f": {', '.join(parts)}" if len(parts) > 1 else ""
    return text + (f"; {found.hidden} more have hidden answers" if found.hidden else "")


def _split_sizes(tasks: TaskSet) -> dict[str, int]:
    splits: Sequence[str] = [tasks.splits[task.id] for task in tasks if task.id in tasks.splits]
    return {split: splits.count(split) for split in dict.fromkeys(splits)}


def _verdict(task_id: str, tasks: TaskSet, found: Score) -> str:
    if any(answer is None for answer in tasks.answers[task_id]):
        return "hidden"
    return "[green]solved[/]" if task_id in found.solved_ids else "[red]not solved[/]"


def _votes(solution: Solution, task_id: str) -> str:
    """Votes of the first attempt of each test input, of all votes for a grid."""
    texts = []
    for candidates in solution.candidates[task_id]:
        total = sum(c.votes for c in candidates)
        texts.append(f"{candidates[0].votes}/{total}" if candidates else "none")
    return ", ".join(texts)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
