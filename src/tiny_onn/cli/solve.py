"""``tiny-onn solve``: learn the chosen tasks' demonstrations, then answer their tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_onn.cli import options as opt

if TYPE_CHECKING:
    from tiny_onn.arc.recipe import Recipe
    from tiny_onn.arc.scoring import Score
    from tiny_onn.arc.solving import Solution


def solve(
    data: opt.Data = None,
    tasks: opt.Tasks = None,
    max_cells: opt.MaxCells = None,
    split: opt.Split = None,
    minutes: opt.Minutes = None,
    steps: opt.Steps = None,
    seed: opt.Seed = None,
    config: opt.Config = None,
    out: opt.Out = Path("runs/solve"),
    checkpoint_every: opt.CheckpointEvery = None,
    resume: opt.Resume = False,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train on the demonstrations of the chosen tasks; answer each test input twice."""
    import torch

    from tiny_onn.arc import load_tasks
    from tiny_onn.arc.recipe import Recipe
    from tiny_onn.arc.report import write_report
    from tiny_onn.arc.scoring import score
    from tiny_onn.arc.solving import solve as solve_tasks
    from tiny_onn.cli.display import RunDisplay
    from tiny_onn.cli.results import print_results, write_results, write_tasks
    from tiny_onn.config import dump_config, load_config
    from tiny_onn.runinfo import run_info

    if threads is not None:
        torch.set_num_threads(threads)
    overrides = {
        "data.source": data,
        "data.tasks": tasks,
        "data.max_cells": max_cells,
        "data.split": split,
        "schedule.minutes": minutes,
        "schedule.steps": steps,
        "seed": seed,
        "training.checkpoint_every": checkpoint_every,
    }
    if resume and config is None:
        config = out / "config.toml"
        if not config.exists():
            raise ValueError(f"{out}: there is no run to go on with")
    recipe = load_config(Recipe, config, overrides)
    chosen = load_tasks(
        recipe.data.source,
        split=recipe.data.split,
        ids=recipe.data.tasks or None,
        max_cells=recipe.data.max_cells,
        skip_bad=skip_bad,
    )
    console = opt.console(json)
    for problem in chosen.problems:
        opt.warn(f"skipped: {problem}")

    def on_decode(done: int, total: int) -> None:
        if stopping:
            raise KeyboardInterrupt
        display.on_decode(done, total)

    with RunDisplay(console) as display, _stop_signals() as stopping:
        solution = solve_tasks(
            chosen,
            recipe,
            out=out,
            resume=resume,
            device=device,
            on_start=lambda: write_tasks(out, chosen, dump_config(recipe)),
            on_step=display.on_step,
            on_decode=on_decode,
            stop=lambda: bool(stopping),
        )
    found = score(solution.attempts, chosen.answers)
    result = _result(recipe, solution, found) | run_info(recipe.seed)
    write_results(out, chosen, solution, result)
    print_results(console, chosen, solution, found)
    console.print(f"report: {write_report(out)}", highlight=False, soft_wrap=True)
    if json:
        opt.print_json(result)


def _result(recipe: Recipe, solution: Solution, found: Score) -> dict[str, Any]:
    return found.to_json() | {
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
def _stop_signals() -> Iterator[list[int]]:
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
