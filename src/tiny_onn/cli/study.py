"""``tiny-onn study``: a claim put to the test over several seeds."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tiny_onn.cli import options as opt

if TYPE_CHECKING:
    from tiny_onn.studies.findings import Findings
    from tiny_onn.studies.runs import Observer

study = typer.Typer(add_completion=False, help="Put a claim to the test over several seeds.")

Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for runs, tables and plot; goes on there."),
]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds are reported.")]
Full = Annotated[bool, typer.Option("--full", help="The published sizes: for a GPU or a night.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes of one thread each; all cores by default.")
]


@study.callback()
def group() -> None:
    """Put a claim to the test over several seeds."""
    # Terminated as if interrupted, so that the processes of a study end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@study.command("optimizer")
def study_optimizer(
    out: Out = Path("runs/study-optimizer"),
    seeds: Seeds = 3,
    full: Full = False,
    workers: Workers = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Does ARS2-Neo learn better than AdamW, Muon and SAM? And does AGA beat a coin?"""
    from tiny_onn.studies.optimizer import study as run

    found = run(out, full=full, seeds=seeds, workers=cores(workers), observer=progress(json))
    show(found, out, json)


@study.command("routing")
def study_routing(
    out: Out = Path("runs/study-routing"),
    seeds: Seeds = 5,
    full: Full = False,
    workers: Workers = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Is an MLP the only router that follows XOR? And what do routers cost?"""
    from tiny_onn.studies.routing import study as run

    found = run(out, full=full, seeds=seeds, workers=cores(workers), observer=progress(json))
    show(found, out, json)


@study.command("shaping")
def study_shaping(
    out: Out = Path("runs/study-shaping"),
    seeds: Seeds = 3,
    full: Full = False,
    workers: Workers = None,
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """What does shaping the routes do to learning, and to the routes?"""
    from tiny_onn.studies.shaping import study as run

    found = run(out, full=full, seeds=seeds, workers=cores(workers), observer=progress(json))
    show(found, out, json)


def cores(workers: int | None) -> int:
    """So many processes, or one for each core."""
    return workers or os.cpu_count() or 1


def show(findings: Findings, out: Path, json: bool) -> None:
    """Write what a study found into its folder, and print it."""
    from tiny_onn.runinfo import run_info
    from tiny_onn.studies.findings import finite

    findings.write(out)
    console = opt.console(json)
    for title, rows in findings.tables.items():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in rows[0] if rows else ():
            table.add_column(column)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
    for verdict in findings.verdicts:
        console.print(str(verdict), highlight=False, soft_wrap=True, markup=False)
    console.print(f"tables and plot: {out}", highlight=False, soft_wrap=True, markup=False)
    if json:
        opt.print_json(finite(findings.result) | run_info(0))


def progress(json: bool) -> Observer:
    """Says one line for every run that ends."""
    console = opt.console(json)

    def on_run(done: int, total: int, settings: dict[str, Any], figures: dict[str, Any]) -> None:
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        console.print(f"{done}/{total} {words}", highlight=False, soft_wrap=True, markup=False)

    return on_run
