"""``tiny-onn report``: write the HTML report of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiny_onn.cli import options as opt

RUN_KEYS = ("seed", "commit", "hardware", "versions")
"""What the JSON says of the run, as it was when it ran; null where its folder does not say."""


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as solve writes it.")],
    json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write report.html into the folder of a run, from the files in it."""
    from tiny_onn.arc.report import read_run, write_report

    path = write_report(run)
    opt.console(json).print(f"report: {path}", highlight=False, soft_wrap=True, markup=False)
    if json:
        result = read_run(run).result
        opt.print_json({"path": str(path)} | {key: result.get(key) for key in RUN_KEYS})
