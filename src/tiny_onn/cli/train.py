"""``tiny-onn train``: learn the chosen tasks' demonstrations, into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tiny_onn.cli import options as opt
from tiny_onn.cli import runs

if TYPE_CHECKING:
    from tiny_onn.arc.training import TrainingRun

LAST_STEPS = 50
"""The loss said at the end is the mean over so many."""


def train(
    data: opt.Data = None,
    tasks: opt.Tasks = None,
    max_cells: opt.MaxCells = None,
    split: opt.Split = None,
    minutes: opt.Minutes = None,
    steps: opt.Steps = None,
    seed: opt.Seed = None,
    config: opt.Config = None,
    out: opt.Out = Path("runs/train"),
    checkpoint_every: opt.CheckpointEvery = None,
    resume: opt.Resume = False,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train a checkpoint on the demonstrations of the chosen tasks; eval answers their tests."""
    opt.use_threads(threads)
    settings = runs.settings(data, tasks, max_cells, split, minutes, steps, seed, checkpoint_every)
    recipe = runs.read_recipe(out, config, resume, settings)
    chosen = runs.chosen_tasks(recipe, skip_bad)
    from tiny_onn.arc.solving import train as train_tasks
    from tiny_onn.cli.display import RunDisplay
    from tiny_onn.cli.results import write_tasks
    from tiny_onn.config import dump_config
    from tiny_onn.runinfo import run_info

    console = opt.console(json)
    with RunDisplay(console) as display, runs.stop_signals() as stopping:
        run = train_tasks(
            chosen,
            recipe,
            out=out,
            resume=resume,
            device=device,
            on_start=lambda: write_tasks(out, chosen, dump_config(recipe)),
            on_step=display.on_step,
            stop=lambda: bool(stopping),
        )
    result = _figures(run, out)
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    console.print(
        f"{len(chosen)} tasks, {run.step:,} steps, {run.tokens:,} tokens, loss {loss}; "
        f"tiny-onn eval --out {out} answers their tests",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if json:
        opt.print_json(result | run_info(recipe.seed))


def _figures(run: TrainingRun, out: Path) -> dict[str, Any]:
    from tiny_onn.arc.metrics import read_metrics

    last = [row["loss"] for row in read_metrics(out / "metrics.jsonl")[-LAST_STEPS:]]
    finite = [loss for loss in last if loss is not None]
    return {
        "loss": fmean(finite) if finite else None,
        "steps": run.step,
        "tokens": run.tokens,
        "tokens_per_second": round(run.tokens / run.seconds, 1) if run.seconds else 0.0,
        "train_seconds": round(run.seconds, 2),
        "tasks": len(run.task_ids),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
