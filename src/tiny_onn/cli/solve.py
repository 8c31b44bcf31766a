"""``tiny-onn solve``: learn the chosen tasks' demonstrations, then answer their tests."""

from __future__ import annotations

from pathlib import Path

from tiny_onn.cli import options as opt
from tiny_onn.cli import runs


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
    opt.use_threads(threads)
    settings = runs.settings(data, tasks, max_cells, split, minutes, steps, seed, checkpoint_every)
    recipe = runs.read_recipe(out, config, resume, settings)
    chosen = runs.chosen_tasks(recipe, skip_bad)
    from tiny_onn.arc.solving import solve as solve_tasks
    from tiny_onn.cli.display import RunDisplay
    from tiny_onn.cli.results import write_tasks
    from tiny_onn.config import dump_config

    def on_decode(done: int, total: int) -> None:
        if stopping:
            raise KeyboardInterrupt
        display.on_decode(done, total)

    console = opt.console(json)
    with RunDisplay(console) as display, runs.stop_signals() as stopping:
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
    runs.finish(out, chosen, recipe, solution, console, json)
