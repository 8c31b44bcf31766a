"""What the report shows of a run's routes, from its `routing.json`, drawn as inline SVG.

`arc/routes.py` writes the file and says what stands in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tiny_onn.arc.draw import cell_size, grid_svg
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.parsing import TaskError, parse_grid, read_json, show

Shares = np.ndarray
"""Shares of the routes, 0-1, ``[site][column][expert]``."""

_MOST_EXPERTS, _MOST_CELLS = 1024, 500_000
_WIDTH, _LEFT, _TOP, _GAP = 760, 168, 50, 5
_SHADES = 10
_NUMBERED_SIDE = 12


@dataclass(frozen=True)
class RouteExample:
    """One test input and an answer to it: their grids, and each site's choices for their cells."""

    title: str
    grids: list[Markup]
    sites: list[tuple[str, list[Markup]]]


@dataclass(frozen=True)
class RouteView:
    """The maps of load and tasks, the examples, and the experts' colours for their legend."""

    maps: list[Markup]
    examples: list[RouteExample]
    legend: list[tuple[int, str]]


def read_routes(path: Path) -> RouteView | None:
    """Draw what a `routing.json` holds, or return None where there is no such file.

    Raises ValueError, naming the file and the place in it, when it does not hold what it should.
    """
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise TaskError([f"{show(path)}: is not a JSON object"])
    problems: list[str] = []
    experts = value.get("experts")
    if type(experts) is not int or not 1 <= experts <= _MOST_EXPERTS:
        raise TaskError([f"{show(path)}.experts: is not a number in 1-{_MOST_EXPERTS}"])
    sites, tasks = (
        _texts(value.get(key), f"{show(path)}.{key}", problems) for key in ("sites", "tasks")
    )
    steps = value.get("steps")
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        raise TaskError([*problems, f"{show(path)}.steps: is not a list of steps"])
    load, by_task = (
        _shares(value.get(key), (*columns, experts), f"{show(path)}.{key}", problems)
        for key, columns in (
            ("load", (len(steps), len(sites))),
            ("load_by_task", (len(sites), len(tasks))),
        )
    )
    examples = value.get("examples")
    drawn = [
        _example(entry, experts, f"{show(path)}.examples[{i}]", problems)
        for i, entry in enumerate(examples if isinstance(examples, list) else [])
    ]
    if problems:
        raise TaskError(problems)
    maps = [
        map_svg(
            load.transpose(1, 0, 2),
            "Load of the experts",
            "share of a site's routes; a row is an expert",
            sites,
            _step_labels(steps),
            "step",
        ),
        map_svg(
            by_task,
            "Experts by task",
            "share of a task's routes at the end; a row is an expert, a column a task",
            sites,
            [*enumerate(tasks)],
            "",
        ),
    ]
    return RouteView(
        maps=[Markup(svg) for svg in maps if svg],
        examples=[example for example in drawn if example is not None],
        legend=[(expert, _colour(expert)) for expert in range(min(experts, 16))],
    )


def map_svg(
    shares: Shares,
    title: str,
    unit: str,
    sites: Sequence[str],
    columns: Sequence[tuple[int, str]],
    axis: str,
) -> str:
    """Draw shares ``[site][column][expert]`` as one inline `<svg>`: a row of cells an expert, the
    rows of a site together, the darker the larger the share; nothing at all where it is 0.

    `columns`: (index, name) of those to name; names stand upright where there is no `axis` and as
    long as there is room for all of them. Returns "" when there is nothing to draw.
    """
    num_sites, num_columns, experts = shares.shape
    if not shares.any():
        return ""
    row = min(max(420 / (num_sites * experts), 4.0), 12.0)
    block = row * experts + _GAP
    top = _TOP if axis else _TOP + 54
    bottom = top + num_sites * block
    height = bottom + (34 if axis else 6)
    column = (_WIDTH - _LEFT) / num_columns
    most = float(shares.max())
    summary = f"{title} ({unit}): at most {100 * most:.0f} % of a site's routes go to one expert"
    parts = [
        f'<svg class="map" role="img" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}"'
        f' height="{height:g}" xmlns="http://www.w3.org/2000/svg" font-family="inherit"'
        f' font-size="11" fill="currentColor"><title>{escape(summary)}</title>',
        f'<text x="0" y="13" font-size="14" font-weight="600">{escape(title)}</text>',
        f'<text x="0" y="29" opacity=".7">{escape(unit)}</text>',
        *_scale(most),
    ]
    for site, name in enumerate(sites):
        y = top + site * block
        parts.append(_text(_LEFT - 8, y + row * experts / 2 + 4, name[-26:], "end"))
        parts.append(
            f'<path d="M{_LEFT} {y:g}h{_WIDTH - _LEFT}v{row * experts:g}H{_LEFT}z" fill="none"'
            f' stroke="currentColor" stroke-opacity=".2"/>'
            f'<g transform="translate({_LEFT} {y:g}) scale({column:.5g} {row:.5g})">'
        )
        parts += _shaded(shares[site].T / most)
        parts.append("</g>")
    parts += _column_names(columns, num_columns, column, top, bottom, axis)
    return "".join([*parts, "</svg>"])


def _shaded(rows: np.ndarray) -> Iterator[str]:
    """Cells of like shade as one path, neighbours in a row joined."""
    levels = np.ceil(rows * _SHADES - 1e-9).astype(int)
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(levels.tolist()):
        x = 0
        for level, run in groupby(row):
            length = len(list(run))
            paths.setdefault(level, []).append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    for level in sorted(paths.keys() - {0}):
        opacity = f"{level / _SHADES:.2g}"
        yield (
            f'<path fill="var(--line-1,#2563EB)" fill-opacity="{opacity}"'
            f' d="{"".join(paths[level])}"/>'
        )


def _scale(most: float) -> Iterator[str]:
    """The key to the shades, at the top right."""
    x = _WIDTH - 60 - 12 * _SHADES
    yield _text(x - 6, 13, "0 %", "end")
    for level in range(1, _SHADES + 1):
        yield (
            f'<path fill="var(--line-1,#2563EB)" fill-opacity="{level / _SHADES:.2g}"'
            f' d="M{x + 12 * (level - 1)} 4h12v10h-12z"/>'
        )
    yield _text(_WIDTH - 54, 13, f"{100 * most:.0f} %", "start")


def _column_names(
    columns: Sequence[tuple[int, str]],
    num_columns: int,
    width: float,
    top: float,
    bottom: float,
    axis: str,
) -> Iterator[str]:
    if axis:
        for index, name in columns:
            yield _text(_LEFT + (index + 0.5) * width, bottom + 11, name, "middle")
        yield _text((_LEFT + _WIDTH) / 2, bottom + 27, axis, "middle")
    elif width < 9:
        text = f"{num_columns} tasks, in the order above"
        yield _text((_LEFT + _WIDTH) / 2, top - 8, text, "middle")
    else:
        for index, name in columns:
            x, y = _LEFT + (index + 0.5) * width + 3, top - 5
            short = escape(name if len(name) <= 9 else f"{name[:8]}…")
            yield (
                f'<text x="{x:.4g}" y="{y:g}" font-size="9" opacity=".7"'
                f' transform="rotate(-90 {x:.4g} {y:g})">{short}</text>'
            )


def _step_labels(steps: Sequence[int]) -> list[tuple[int, str]]:
    """About six columns, evenly spread, with their steps."""
    if not steps:
        return []
    count = min(len(steps), 6)
    picked = {round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)}
    return [(index, f"{steps[index]}") for index in sorted(picked)]


def experts_svg(chosen: np.ndarray, cell: int, title: str) -> str:
    """Draw which expert each cell of a grid went to ``[H, W]``: a colour an expert, and its number
    where the grid is small."""
    rows, columns = chosen.shape
    cell = max(cell, math.ceil(24 / max(rows, columns)))
    width, height = columns * cell + 2, rows * cell + 2
    parts = [
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
        f'<g transform="translate(1 1) scale({cell})" shape-rendering="crispEdges">'
    ]
    for expert in np.unique(chosen).tolist():
        cells = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(chosen == expert).tolist())
        parts.append(f'<path fill="{_colour(expert)}" d="{cells}"/>')
    parts.append("</g>")
    if max(rows, columns) <= _NUMBERED_SIDE:
        size = min(0.55 * cell, 11)
        parts.append(f'<g font-size="{size:g}" text-anchor="middle" fill="#111" opacity=".8">')
        for (y, x), expert in np.ndenumerate(chosen):
            middle = f'x="{1 + (x + 0.5) * cell:g}" y="{1 + (y + 0.5) * cell + 0.36 * size:g}"'
            parts.append(f"<text {middle}>{expert}</text>")
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _colour(expert: int) -> str:
    """Hues a golden angle apart: the first few are far from each other, whatever their number."""
    return f"hsl({(200 + 137.5 * expert) % 360:g},62%,{66 - 8 * (expert % 3)}%)"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" opacity=".7">{escape(text)}</text>'


def _example(value: Any, experts: int, where: str, problems: list[str]) -> RouteExample | None:
    entry = value if isinstance(value, dict) else {}
    grids = [
        parse_grid(entry.get(name), f"{where}.{name}", problems) for name in ("input", "answer")
    ]
    test, routes = entry.get("test"), entry.get("routes")
    if type(test) is not int or not isinstance(routes, list):
        problems.append(f"{where}: expected a test, its number, and routes, a list")
        return None
    known = [grid for grid in grids if grid is not None]
    if len(known) < 2:
        return None
    cell = cell_size(*known)
    sites = [
        _site_routes(route, known, experts, cell, f"{where}.routes[{i}]", problems)
        for i, route in enumerate(routes)
    ]
    return RouteExample(
        title=f"{entry.get('task')}, test {test + 1}",
        grids=[
            Markup(grid_svg(grid, cell=cell, title=title))
            for grid, title in zip(known, ("Input", "Answer of most votes"), strict=True)
        ],
        sites=sites,
    )


def _site_routes(
    value: Any, grids: Sequence[Grid], experts: int, cell: int, where: str, problems: list[str]
) -> tuple[str, list[Markup]]:
    route = value if isinstance(value, dict) else {}
    name, drawn = str(route.get("site")), []
    for key, grid in zip(("input", "answer"), grids, strict=True):
        chosen = _numbers(route.get(key))
        if chosen is None or chosen.shape != grid.shape or not _within(chosen, experts - 1):
            problems.append(f"{where}.{key}: expected an expert below {experts} for each cell")
            continue
        title = f"Experts of {name} for the {key}"
        drawn.append(Markup(experts_svg(chosen, cell, title)))
    return name, drawn


def _texts(value: Any, where: str, problems: list[str]) -> list[str]:
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    problems.append(f"{where}: is not a list of names")
    return []


def _shares(value: Any, shape: tuple[int, ...], where: str, problems: list[str]) -> Shares:
    """Thousandths of the given shape as shares; an empty array in place of what isn't that."""
    found = _numbers(value)
    if found is not None and not found.size and not math.prod(shape):
        return np.zeros(shape)
    if found is None or found.shape != shape or not _within(found, 1000):
        size = " × ".join(map(str, shape))
        problems.append(f"{where}: expected {size} numbers in 0-1000")
        return np.zeros(shape)
    return found / 1000


def _numbers(value: Any) -> np.ndarray | None:
    try:
        found = np.array(value)
    except (ValueError, OverflowError):
        return None
    whole = found.dtype.kind == "i" or not found.size
    return found if whole and found.size <= _MOST_CELLS else None


def _within(numbers: np.ndarray, most: int) -> bool:
    return bool(((numbers >= 0) & (numbers <= most)).all())
