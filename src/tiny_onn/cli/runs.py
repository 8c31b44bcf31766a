"""What the commands share that train or answer: settings, tasks, signals, results."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tiny_onn.cli import options as opt

if TYPE_CHECKING:
    from tiny_onn.arc.recipe import Recipe
    from tiny_onn.arc.solving import Solution
    from tiny_onn.arc.tasks import TaskSet


def settings(
    data: str | None,
    tasks: list[str] | None,
    max_cells: int | None,
    split: str | None,
    minutes: float | None,
    steps: int | None,
    seed: int | None,
    checkpoint_every: int | None,
) -> dict[str, Any]:
    """Which setting of a recipe each option stands for, by dotted name."""
    return {
        "data.source": data,
        "data.tasks": tasks,
        "data.max_cells": max_cells,
        "data.split": split,
        "schedule.minutes": minutes,
        "schedule.steps": steps,
        "seed": seed,
        "training.checkpoint_every": checkpoint_every,
    }


def read_recipe(out: Path, config: Path | None, resume: bool, settings: dict[str, Any]) -> Recipe:
    """The settings of a run.

    Args:
        resume: read them from the run's own folder where no file is given.
        settings: by dotted name, over those of the file; None leaves one as it is.

    Raises:
        ValueError: for what a user must mend.
    """
    from tiny_onn.arc.recipe import Recipe
    from tiny_onn.config import load_config

    if resume and config is None:
        config = out / "config.toml"
        if not config.exists():
            raise ValueError(f"{out}: there is no run to go on with")
    return load_config(Recipe, config, settings)


def chosen_tasks(recipe: Recipe, skip_bad: bool) -> TaskSet:
    """The tasks of a recipe; what was wrong with those left out is said on stderr."""
    from tiny_onn.arc import load_tasks

    data = recipe.data
    chosen = load_tasks(
        data.source,
        split=data.split,
        ids=data.tasks or None,
        max_cells=data.max_cells,
        skip_bad=skip_bad,
    )
    for problem in chosen.problems:
        opt.warn(f"skipped: {problem}")
    return chosen


def learnt_tasks(out: Path, source: str | None) -> TaskSet:
    """The tasks that the run in a folder was trained on, in their order.

    Args:
        source: another copy of them, which may know more answers.
    """
    from tiny_onn.arc import TaskSet, load_tasks
    from tiny_onn.arc.parsing import read_json

    kept = load_tasks(out / "tasks.json", solutions=out / "answers.json")
    tasks = load_tasks(source, ids=kept.ids) if source else kept
    ids, splits = list(read_json(out / "tasks.json")), read_json(out / "splits.json")
    return TaskSet(map(tasks.get, ids), tasks.answers, splits=splits, source=tasks.source)


def finish(
    out: Path, tasks: TaskSet, recipe: Recipe, solution: Solution, console: Console, json: bool
) -> None:
    """Score the attempts, write everything into the folder, and print it."""
    from tiny_onn.arc.report import write_report
    from tiny_onn.arc.scoring import score
    from tiny_onn.cli.results import print_results, write_results
    from tiny_onn.runinfo import run_info

    found = score(solution.attempts, tasks.answers)
    result = found.to_json() | figures(recipe, solution) | run_info(recipe.seed)
    write_results(out, tasks, solution, result)
    print_results(console, tasks, solution, found)
    console.print(f"report: {write_report(out)}", highlight=False, soft_wrap=True)
    if json:
        opt.print_json(result)


def figures(recipe: Recipe, solution: Solution) -> dict[str, Any]:
    """What a solution says of the run beside its score."""
    return {
        "train_seconds": round(solution.train_seconds, 2),
        "decode_seconds": round(solution.decode_seconds, 2),
        "tokens_per_second": round(solution.tokens_per_second, 1),
        "tokens": solution.tokens,
        "padding": round(solution.padding, 4),
        "parameters": solution.parameters,
        "steps": solution.steps,
        "views": recipe.decode.views,
    }


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that training can stop between two steps; a second one of
    them acts as ever."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
