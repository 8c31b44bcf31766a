"""``tiny-onn bench``: speed and memory, ours beside the peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tiny_onn.cli import options as opt

bench = typer.Typer(add_completion=False, help="Speed and memory, ours beside the peers.")


@bench.callback()
def group() -> None:
    """Speed and memory, ours beside the peers."""


@bench.command("optim")
def bench_optim(
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each optimizer.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Timed training steps of each mode.")] = 30,
    threads: opt.Threads = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What a step of ARS2-Neo costs, beside AdamW, Muon and SAM."""
    from tiny_onn.arc import load_tasks
    from tiny_onn.arc.recipe import Recipe
    from tiny_onn.benchmarks.optim import bench_optim as measure

    opt.use_threads(threads)
    recipe = Recipe()
    tasks = list(load_tasks(recipe.data.source, max_cells=25))
    show(measure(recipe, tasks, rounds=rounds, steps=steps), json)


@bench.command("model")
def bench_model(
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each model.")] = 7,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile all models.")] = False,
    threads: opt.Threads = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Tokens a second, beside transformers' Qwen3-MoE and a dense model."""
    from tiny_onn.benchmarks.model import bench_model as measure

    opt.use_threads(threads)
    show(measure(rounds=rounds, compiled=compiled), json)


@bench.command("shaping")
def bench_shaping(
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each strategy.")] = 15,
    threads: opt.Threads = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What FARS adds to a training step, beside SARS and the balance loss."""
    from tiny_onn.benchmarks.shaping import bench_shaping as measure

    opt.use_threads(threads)
    show(measure(rounds=rounds), json)


def show(result: dict[str, Any], json: bool) -> None:
    """Print what a bench measured: a line for every figure, or one JSON line."""
    from tiny_onn.runinfo import run_info

    console = opt.console(json)
    for name, figure in flat(result):
        text = figure if isinstance(figure, str) else f"{figure:,.4g}"
        console.print(f"{name:48} {text:>12}", highlight=False)
    if json:
        opt.print_json(result | run_info(0))


def flat(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """The figures of nested results with their dotted names."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
