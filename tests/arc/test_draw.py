"""Drawings are read back: what a grid's SVG or text shows is the grid."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from tiny_onn.arc.draw import (
    COLOURS,
    Chart,
    Form,
    cell_size,
    grid_svg,
    grid_text,
    history_svg,
    print_task,
    task_table,
)
from tiny_onn.arc.grids import Grid, as_grid
from tiny_onn.arc.tasks import Pair, Task

SVG = "{http://www.w3.org/2000/svg}"
RUN = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z")
SHAPES = ((1, 1), (1, 30), (30, 1), (2, 3), (7, 5), (30, 30))


def random_grid(rows: int, columns: int, seed: int = 0, colours: int = 10) -> Grid:
    return as_grid(np.random.default_rng(seed).integers(0, colours, (rows, columns)))


def read_svg(text: str, shape: tuple[int, int]) -> tuple[ElementTree.Element, Any]:
    """The SVG's root and the grid it paints, -1 where nothing is painted."""
    root = ElementTree.fromstring(text)
    seen = np.full(shape, -1)
    for path in root.iter(f"{SVG}path"):
        if path.get("fill") == "none":
            continue
        for x, y, width, height, back in RUN.findall(path.get("d", "")):
            assert width == back
            area = seen[int(y) : int(y) + int(height), int(x) : int(x) + int(width)]
            assert area.shape == (int(height), int(width))
            area[:] = COLOURS.index(path.get("fill", ""))
    return root, seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colours", [1, 3, 10])
def test_svg_paints_the_grid(shape: tuple[int, int], colours: int) -> None:
    grid = random_grid(*shape, colours=colours)
    root, seen = read_svg(grid_svg(grid), shape)
    assert np.array_equal(seen, grid)
    assert root.get("role") == "img"
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == f"grid of {shape[0]} by {shape[1]} cells"


@pytest.mark.parametrize("shape", SHAPES)
def test_svg_is_of_a_sensible_size(shape: tuple[int, int]) -> None:
    root = ElementTree.fromstring(grid_svg(random_grid(*shape)))
    width, height = int(root.get("width", "")), int(root.get("height", ""))
    assert 24 <= max(width, height) <= 220
    assert root.get("viewBox") == f"0 0 {width} {height}"


def test_svg_is_compact() -> None:
    assert len(grid_svg(as_grid(np.zeros((30, 30), dtype=np.uint8)))) < 1000
    assert len(grid_svg(random_grid(30, 30))) < 16_000


def test_svg_cell_and_lines() -> None:
    root = ElementTree.fromstring(grid_svg(random_grid(3, 4), cell=20))
    assert (root.get("width"), root.get("height")) == ("82", "62")
    lines = [p for p in root.iter(f"{SVG}path") if p.get("fill") == "none"]
    assert len(lines) == 1
    assert lines[0].get("d", "").count("v3") == 5
    assert lines[0].get("d", "").count("h4") == 4


def test_small_grid_at_a_small_scale_is_still_seen() -> None:
    root = ElementTree.fromstring(grid_svg(random_grid(1, 1), cell=7))
    assert int(root.get("width", "")) == 26


def test_marks_differ_without_colour() -> None:
    grid = random_grid(2, 2)
    right, wrong, plain = (
        ElementTree.fromstring(grid_svg(grid, title="Attempt 1", mark=mark))
        for mark in ("right", "wrong", None)
    )
    assert [root[0].text for root in (right, wrong, plain)] == [
        "Attempt 1, right",
        "Attempt 1, wrong",
        "Attempt 1",
    ]
    frames = [root.find(f"{SVG}rect") for root in (right, wrong, plain)]
    assert frames[0] is not None and frames[0].get("stroke-dasharray") is None
    assert frames[1] is not None and frames[1].get("stroke-dasharray") == "6 4"
    assert frames[2] is None


def test_title_is_escaped() -> None:
    root = ElementTree.fromstring(grid_svg(random_grid(1, 1), title='<b>&"'))
    assert root[0].text == '<b>&"'


def test_cell_size_fits_the_largest_grid() -> None:
    assert cell_size(random_grid(3, 3)) == 26
    assert cell_size(random_grid(3, 3), random_grid(10, 12)) == 18
    assert cell_size(random_grid(30, 2)) == 7


def columns_of(text: Text) -> list[list[tuple[str, str | None, str | None]]]:
    """Every character of a text with the colours in front of and behind it, by line."""
    console = Console(color_system="truecolor", width=200)
    return [
        [
            (
                character,
                style.color.name.upper() if style.color else None,
                style.bgcolor.name.upper() if style.bgcolor else None,
            )
            for segment in console.render(line, console.options.update(no_wrap=True))
            if (style := segment.style) is not None
            for character in segment.text
        ]
        for line in text.split("\n")
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_cells_are_two_columns_wide(shape: tuple[int, int]) -> None:
    grid = random_grid(*shape)
    seen = columns_of(grid_text(grid))
    expected = [[(" ", None, COLOURS[c].upper()) for c in row for _ in "12"] for row in grid]
    assert seen == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_half_blocks_hold_two_rows(shape: tuple[int, int]) -> None:
    grid = random_grid(*shape)
    seen = columns_of(grid_text(grid, "halves"))
    assert len(seen) == (shape[0] + 1) // 2
    for y, line in enumerate(seen):
        assert [front for _, front, _ in line] == [COLOURS[c].upper() for c in grid[2 * y]]
        below: Sequence[str | None] = [None] * shape[1]
        if 2 * y + 1 < shape[0]:
            below = [COLOURS[c].upper() for c in grid[2 * y + 1]]
        assert [back for _, _, back in line] == below


@pytest.mark.parametrize(("form", "expected"), [("digits", "0 1\n2 9"), ("dense", "01\n29")])
def test_digits(form: Form, expected: str) -> None:
    assert grid_text(as_grid([[0, 1], [2, 9]]), form).plain == expected


IN, OUT, ANSWER = (as_grid([[c, c + 1], [c + 2, c]]) for c in (1, 4, 7))
TASK = Task("ab[red]", (Pair(IN, OUT),), (Pair(IN, None), Pair(OUT, None)))


def printed(task: Task, width: int = 100, colour: bool = False, **known: Any) -> str:
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
        _environ={},
    )
    print_task(console, task, **known)
    return file.getvalue()


def test_a_task_without_colour_is_digits_and_words() -> None:
    text = printed(TASK, answers=[ANSWER, None], attempts=[[ANSWER, IN], [OUT]])
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0].startswith("ab[red] ---")
    assert lines[1:5] == ["demonstrations", "input   output", "1 2   → 4 5", "3 1     6 4"]
    assert lines[6:10] == [
        "test input 1",
        "input   attempt 1: right   attempt 2: wrong   answer",
        "1 2     7 8                1 2                7 8",
        "3 1     9 7                3 1                9 7",
    ]
    assert lines[11:15] == ["test input 2", "input   attempt 1", "4 5     4 5", "6 4     6 4"]
    assert "\x1b" not in text


def test_a_task_in_colour_is_cells_or_half_blocks() -> None:
    text = printed(TASK, colour=True)
    assert "48;2;0;116;217m  \x1b" in text
    assert "▀" not in text
    assert not re.search(r"m\d \d", text)
    large = random_grid(20, 20)
    assert "▀" in printed(Task("x", (Pair(large, large),), (Pair(IN, None),)), colour=True)


def test_a_large_task_fits_a_narrow_console() -> None:
    large = random_grid(30, 30)
    text = printed(Task("x", (Pair(large, large),), (Pair(large, None),)), width=70)
    assert max(map(len, text.splitlines())) <= 70
    row = "".join(map(str, large[0].tolist()))
    assert sum(line.count(row) for line in text.splitlines()) == 3


def test_a_missing_grid_is_said() -> None:
    text = printed(TASK, attempts=[[None], []], answers=[ANSWER, OUT])
    assert "attempt 1: wrong" in text
    assert "no grid" in text


@pytest.mark.parametrize("name", ["attempts", "answers"])
def test_wrong_counts_are_refused(name: str) -> None:
    known: dict[str, Any] = {name: [None]}
    with pytest.raises(ValueError, match=rf"{name} at 1 test inputs, expected 2"):
        task_table(TASK, **known)


CHART = Chart("Title <1>", "unit", {"a": "first", "b": "second"})


def chart(rows: Sequence[dict[str, Any]], what: Chart = CHART) -> ElementTree.Element:
    return ElementTree.fromstring(history_svg(rows, what))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def line_points(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = []
    for path in root.iter(f"{SVG}path"):
        if path.get("class") == "line":
            pairs = [point.split() for point in path.get("d", "")[1:].split("L")]
            lines.append([(float(x), float(y)) for x, y in pairs])
    return lines


def test_a_chart_is_drawn_to_scale() -> None:
    root = chart([{"step": i, "a": float(i * i)} for i in range(0, 11)])
    (points,) = line_points(root)
    assert len(points) == 11
    (left, bottom), (right, top) = points[0], points[-1]
    assert left < right and top < bottom
    for i, (x, y) in enumerate(points):
        assert x == pytest.approx(left + (right - left) * i / 10, abs=0.06)
        assert y == pytest.approx(bottom + (top - bottom) * i * i / 100, abs=0.06)
    labels = texts(root)
    assert labels[:2] == ["Title <1>", "unit"]
    assert {"0", "50", "100", "step"} <= set(labels)
    assert root[0].text == "Title <1> (unit): first from 0 to 100"


def test_a_logarithmic_chart_turns_a_power_into_a_line() -> None:
    what = Chart("t", "u", {"a": "a"}, log=True)
    root = chart([{"step": i, "a": 10.0**-i} for i in range(5)], what)
    (points,) = line_points(root)
    drops = np.diff([y for _, y in points])
    assert drops == pytest.approx(np.full(4, drops[0]), abs=0.2)
    assert "u, logarithmic" in texts(root)
    assert {"1", "0.01", "1.0e-04"} <= set(texts(root))
    flat = chart([{"step": i, "a": float(-i)} for i in range(5)], what)
    assert "u, logarithmic" not in texts(flat)


def test_many_steps_are_averaged_with_their_range() -> None:
    rows = [{"step": i, "a": 1.0 + (-1) ** i} for i in range(1600)]
    root = chart(rows)
    (points,) = line_points(root)
    assert len(points) == 160
    # A middle of 1 between 0 and 2, whose mean alone would hide the swing.
    assert root[0].text == "Title <1> (unit): first from 1 to 1"
    band = [p for p in root.iter(f"{SVG}path") if p.get("fill-opacity")]
    assert len(band) == 1


def test_what_is_no_number_is_no_point() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "a": None},
        {"step": 2, "a": float("nan")},
        {"step": 3, "a": float("inf")},
        {"step": 4},
        {"step": 5, "a": 3.0},
        {"step": 6, "a": 4.0},
    ]
    (points,) = line_points(chart(rows))
    assert len(points) == 2
    assert history_svg(rows[:4], CHART) == ""
    assert history_svg([], CHART) == ""


def test_nothing_but_zeros_is_not_drawn() -> None:
    assert history_svg([{"step": i, "a": 0.0} for i in range(5)], CHART) == ""
    assert "12 %" in history_svg([{"step": 7, "a": 0.12}], Chart("t", "u", {"a": "a"}, True))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1e308] * 400,
        [1.0, 1e308, -1e308, 2.0],
        [1.0, 10**400, 2.0],
        [1.0, 5e-324, 2.0],
        [1.0, 1e100, 1e-100, 2.0],
        [1.0, -1.0] * 200,
        [1e-9, 2.5],
    ],
)
def test_numbers_of_any_size_are_drawn_or_left_out(
    values: list[float], log: bool, zero: bool
) -> None:
    extreme = Chart("t", "u", {"a": "a"}, log=log, zero=zero)
    svg = history_svg([{"step": i, "a": value} for i, value in enumerate(values)], extreme)
    assert (svg == "") == (min(values) > 1e100)
    assert "nan" not in svg and "inf" not in svg
    if svg:
        ElementTree.fromstring(svg)


def test_two_lines_differ_without_colour_and_their_ends_do_not_overlap() -> None:
    root = chart([{"step": i, "a": i, "b": i + 0.01} for i in range(9)])
    assert len(line_points(root)) == 2
    dashed = [p.get("stroke-dasharray") for p in root.iter(f"{SVG}path") if p.get("class")]
    assert dashed == [None, "5 3"]
    assert {"first", "second"} <= set(texts(root))
    ends = [float(e.get("y", "")) for e in root.iter(f"{SVG}text") if e.get("font-weight") == "600"]
    assert ends[2] - ends[1] >= 12
