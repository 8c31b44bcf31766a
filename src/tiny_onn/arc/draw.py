"""Drawing grids and tasks: inline SVG for the report, coloured text for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

import numpy as np
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tiny_onn.arc.charts import CHARTS as CHARTS
from tiny_onn.arc.charts import Chart as Chart
from tiny_onn.arc.charts import history_svg as history_svg
from tiny_onn.arc.grids import MAX_SIDE, Grid
from tiny_onn.arc.parsing import show
from tiny_onn.arc.tasks import Task

COLOURS = (
    "#000000",
    "#0074D9",
    "#FF4136",
    "#2ECC40",
    "#FFDC00",
    "#AAAAAA",
    "#F012BE",
    "#FF851B",
    "#7FDBFF",
    "#870C25",
)
"""The colours 0-9 of the ARC-AGI web editor."""

Mark = Literal["right", "wrong"]
Form = Literal["cells", "halves", "digits", "dense"]

_LINES = "#555555"
# A dashed frame says "wrong" without colour, too.
_FRAMES = {"right": 'stroke="#2DA44E"', "wrong": 'stroke="#E5534B" stroke-dasharray="6 4"'}
_TARGET_SIDE = 216
_LARGEST_CELL = 26
_SMALLEST_SIDE = 24
_LARGEST_IN_CELLS = 12


def cell_size(*grids: Grid) -> int:
    """The side of a cell, in pixels, at which the largest of some grids is of a calm size."""
    side = max((max(grid.shape) for grid in grids), default=MAX_SIDE)
    return min(_TARGET_SIDE // side, _LARGEST_CELL)


def grid_svg(
    grid: Grid, *, cell: int | None = None, title: str = "", mark: Mark | None = None
) -> str:
    """Draw a grid as one inline `<svg>` element, its colours exact, its cells divided by lines.

    `cell`: side of a cell in pixels, chosen by the grid's size when None; small grids are drawn
    at least 24 pixels wide or high whatever it says, so that they are seen. `title`: what a
    screen reader says, escaped here. `mark` frames the grid: solid for right, dashed for wrong.
    """
    rows, columns = grid.shape
    if cell is None:
        cell = cell_size(grid)
    cell = max(cell, math.ceil(_SMALLEST_SIDE / max(rows, columns)))
    margin = 6 if mark else 1
    width, height = columns * cell + 2 * margin, rows * cell + 2 * margin
    label = title or f"grid of {rows} by {columns} cells"
    if mark:
        label += f", {mark}"
    parts = [
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' shape-rendering="crispEdges" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(label)}</title>"
        f'<g transform="translate({margin} {margin}) scale({cell})">',
        *_cells(grid),
        _lines(rows, columns, 1.0 if cell >= 10 else 0.6),
        "</g>",
    ]
    if mark:
        parts.append(
            f'<rect x="1.5" y="1.5" width="{width - 3}" height="{height - 3}" fill="none"'
            f' stroke-width="3" {_FRAMES[mark]}/>'
        )
    return "".join([*parts, "</svg>"])


def _cells(grid: Grid) -> Iterator[str]:
    """The most frequent colour as one rectangle, each other colour as one path over it."""
    rows, columns = grid.shape
    background = Counter(grid.ravel().tolist()).most_common(1)[0][0]
    yield f'<path fill="{COLOURS[background]}" d="M0 0h{columns}v{rows}h-{columns}z"/>'
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(grid.tolist()):
        x = 0
        for colour, run in groupby(row):
            length = len(list(run))
            paths.setdefault(colour, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    for colour in sorted(paths.keys() - {background}):
        yield f'<path fill="{COLOURS[colour]}" d="{"".join(paths[colour])}"/>'


def _lines(rows: int, columns: int, width: float) -> str:
    down = "".join(f"M{x} 0v{rows}" for x in range(columns + 1))
    across = "".join(f"M0 {y}h{columns}" for y in range(rows + 1))
    return (
        f'<path fill="none" stroke="{_LINES}" stroke-width="{width:g}"'
        f' vector-effect="non-scaling-stroke" d="{down}{across}"/>'
    )


def grid_text(grid: Grid, form: Form = "cells") -> Text:
    """Draw a grid for a terminal.

    `form`: "cells" is coloured, two columns a cell; "halves" is coloured, one column and half a
    line a cell; "digits" and "dense" are plain digits, two columns and one column a cell.
    """
    if form in ("digits", "dense"):
        gap = " " if form == "digits" else ""
        lines = [Text(gap.join(map(str, row))) for row in grid.tolist()]
    elif form == "cells":
        lines = [_coloured_line(row) for row in grid.tolist()]
    else:
        lines = list(_half_lines(grid))
    text = Text("\n").join(lines)
    text.no_wrap = True
    return text


def _coloured_line(row: Sequence[int]) -> Text:
    runs = ((colour, len(list(run))) for colour, run in groupby(row))
    return Text.assemble(*(("  " * length, _paint(back=colour)) for colour, length in runs))


def _half_lines(grid: Grid) -> Iterator[Text]:
    rows: list[list[int]] = grid.tolist()
    for y in range(0, len(rows), 2):
        below: Sequence[int | None] = rows[y + 1] if y + 1 < len(rows) else [None] * len(rows[y])
        cells = zip(rows[y], below, strict=True)
        yield Text.assemble(*(("▀", _paint(front=top, back=bottom)) for top, bottom in cells))


def _paint(front: int | None = None, back: int | None = None) -> Style:
    return Style(
        color=None if front is None else COLOURS[front],
        bgcolor=None if back is None else COLOURS[back],
    )


@dataclass(frozen=True)
class _TaskTable:
    """Demonstrations and test inputs, drawn in the form that suits the console."""

    task: Task
    attempts: Sequence[Sequence[Grid | None]]
    answers: Sequence[Grid | None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        form = self._form(console, options)
        arrow = "->" if options.ascii_only else "→"
        yield Text("demonstrations", style="bold")
        yield Columns([_pair(p.input, p.output, form, arrow) for p in self.task.train], (1, 3))
        for i, pair in enumerate(self.task.test):
            name = f"test input {i + 1}" if len(self.task.test) > 1 else "test"
            yield Text(f"\n{name}", style="bold")
            tries, answer = self.attempts[i], self.answers[i]
            items = [_figure("input", pair.input, form)]
            for rank, grid in enumerate(tries[:2], start=1):
                items.append(_figure(f"attempt {rank}", grid, form, _mark(grid, answer)))
            if answer is not None:
                items.append(_figure("answer", answer, form))
            yield Columns(items, (1, 3))

    def _form(self, console: Console, options: ConsoleOptions) -> Form:
        known = [*self.attempts, self.answers]
        grids = [*self.task.grids(), *(g for row in known for g in row if g is not None)]
        # A pair side by side, two columns a cell and the arrow, is what should fit.
        fits = 4 * max(grid.shape[1] for grid in grids) + 8 <= options.max_width
        if console.color_system is None or console.no_color:
            return "digits" if fits else "dense"
        small = max(max(grid.shape) for grid in grids) <= _LARGEST_IN_CELLS
        return "cells" if (fits and small) or options.ascii_only else "halves"


def _pair(before: Grid, after: Grid | None, form: Form, arrow: str) -> Table:
    table = Table.grid(padding=(0, 1))
    middle = Text("\n" + arrow, style="dim")
    table.add_row(_figure("input", before, form), middle, _figure("output", after, form))
    return table


def _figure(caption: str, grid: Grid | None, form: Form, mark: Mark | None = None) -> Table:
    table = Table.grid()
    style = {"right": "bold green", "wrong": "red"}[mark] if mark else "dim"
    table.add_row(Text(f"{caption}: {mark}" if mark else caption, style=style, no_wrap=True))
    table.add_row(Text("no grid", style="dim") if grid is None else grid_text(grid, form))
    return table


def _mark(grid: Grid | None, answer: Grid | None) -> Mark | None:
    if answer is None:
        return None
    return "right" if grid is not None and np.array_equal(grid, answer) else "wrong"


def task_table(
    task: Task,
    attempts: Sequence[Sequence[Grid | None]] | None = None,
    answers: Sequence[Grid | None] | None = None,
) -> RenderableType:
    """Draw a task for a terminal: demonstrations, then each test input with what is known of it.

    `attempts`: per test input up to two grids; `answers`: per test input a grid, None where it is
    hidden. A console without colour gets digits. Raises ValueError when one of them does not
    stand for each test input.
    """
    for name, given in (("attempts", attempts), ("answers", answers)):
        if given is not None and len(given) != len(task.test):
            text = "task {}: {} at {} test inputs, expected {}"
            raise ValueError(text.format(show(task.id), name, len(given), len(task.test)))
    none = [None] * len(task.test)
    return _TaskTable(task, attempts or [()] * len(task.test), answers or none)


def print_task(
    console: Console,
    task: Task,
    answers: Sequence[Grid | None] | None = None,
    attempts: Sequence[Sequence[Grid | None]] | None = None,
) -> None:
    """Print a task under its id; the arguments are those of `task_table`."""
    console.print(Rule(Text(show(task.id)), align="left", characters="-", style="dim"))
    console.print(task_table(task, attempts, answers))
