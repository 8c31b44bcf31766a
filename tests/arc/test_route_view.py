"""Drawing routes: what a file holds is drawn to scale, and what is wrong with one is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_onn.arc.report import write_report
from tiny_onn.arc.route_view import experts_svg, map_svg, read_routes

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<img src=x onerror=alert(1)>&\"'"
PICTURE: dict[str, Any] = {
    "experts": 2,
    "sites": ["layers.0.mlp", EVIL],
    "steps": [1, 11, 21],
    "load": [[[500, 500], [1000, 0]], [[400, 600], [0, 1000]], [[250, 750], [0, 1000]]],
    "tasks": ["one", EVIL],
    "load_by_task": [[[1000, 0], [0, 1000]], [[0, 0], [500, 500]]],
    "examples": [
        {
            "task": EVIL,
            "test": 0,
            "input": [[1, 2]],
            "answer": [[3]],
            "routes": [{"site": EVIL, "input": [[0, 1]], "answer": [[1]]}],
        }
    ],
}
TASK = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1, 2]]}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "routing.json"
    place.write_text(json.dumps(PICTURE), encoding="utf-8")
    (tmp_path / "tasks.json").write_text(json.dumps({"one": TASK}))
    (tmp_path / "submission.json").write_text("{}")
    return place


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """(opacity, x, y, width) of every shaded run of cells in a map, in cells."""
    found = []
    for path in ET.fromstring(svg).iterfind(f"{SVG}g/{SVG}path"):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d", "")):
            found.append((float(path.get("fill-opacity", 0)), float(x), float(y), float(width)))
    return sorted(found)


def test_a_map_is_drawn_to_scale() -> None:
    # One site of two experts over three columns: 80, 40 and 0 %, and the rest.
    shares = np.array([[[0.8, 0.2], [0.4, 0.6], [0.0, 0.8]]])
    svg = map_svg(shares, "T", "u", ["site"], [(0, "1"), (2, "21")], "step")
    # Darkest is the largest share; 0 is left blank, and so is nothing else.
    assert boxes(svg) == [
        (0.3, 0, 1, 1),
        (0.5, 1, 0, 1),
        (0.8, 1, 1, 1),
        (1, 0, 0, 1),
        (1, 2, 1, 1),
    ]
    texts = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert texts == ["T", "u", "0 %", "80 %", "site", "1", "21", "step"]
    assert map_svg(np.zeros((1, 3, 2)), "T", "u", ["site"], [], "step") == ""
    assert map_svg(np.zeros((1, 0, 2)), "T", "u", ["site"], [], "") == ""


def test_neighbours_of_a_shade_are_one_box() -> None:
    svg = map_svg(np.full((2, 50, 4), 0.25), "T", "u", ["a", "b"], [], "step")
    assert boxes(svg) == [(1, 0, y, 50) for y in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_many_tasks_have_no_names() -> None:
    shares = np.full((1, 100, 2), 0.5)
    names = [*enumerate(f"task-{i}" for i in range(100))]
    assert "100 tasks, in the order above" in map_svg(shares, "T", "u", ["s"], names, "")
    few = map_svg(shares[:, :3], "T", "u", ["s"], names[:3], "")
    assert "task-2" in few and "in the order above" not in few


def test_cells_have_their_experts_colour_and_number() -> None:
    svg = ET.fromstring(experts_svg(np.array([[0, 1, 1], [0, 0, 7]]), 10, "title"))
    assert (svg.get("width"), svg.get("height")) == ("32", "22")
    paths = [(path.get("fill"), path.get("d", "").count("M")) for path in svg.iter(f"{SVG}path")]
    assert [count for _, count in paths] == [3, 2, 1]
    assert len({fill for fill, _ in paths}) == 3
    assert [text.text for text in svg.iter(f"{SVG}text")] == ["0", "1", "1", "0", "0", "7"]
    large = ET.fromstring(experts_svg(np.zeros((13, 13), int), 10, "title"))
    assert not list(large.iter(f"{SVG}text"))


def test_every_part_is_in_the_report_and_escaped(path: Path) -> None:
    view = read_routes(path)
    assert view is not None
    for svg in (*view.maps, *(g for e in view.examples for _, gs in e.sites for g in gs)):
        ET.fromstring(svg)
    html = write_report(path.parent).read_text(encoding="utf-8")
    assert "<img" not in html
    assert html.count('class="map"') == 2
    assert "Cell by cell" in html and "Input and answer" in html
    bare = html.replace("http://www.w3.org/2000/svg", "").lower()
    assert not [text for text in ("http", "url(", "//", "<script") if text in bare]


def test_a_run_without_the_file_has_no_such_part(path: Path) -> None:
    path.unlink()
    assert read_routes(path) is None
    html = write_report(path.parent).read_text(encoding="utf-8")
    assert 'id="routes"' not in html


def test_a_run_without_tasks_or_examples_is_drawn_as_far_as_it_goes(path: Path) -> None:
    path.write_text(json.dumps(PICTURE | {"tasks": [], "load_by_task": [[], []], "examples": []}))
    view = read_routes(path)
    assert view is not None and len(view.maps) == 1 and not view.examples


def spoilt(key: str, value: Any) -> dict[str, Any]:
    return PICTURE | {key: value}


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ([], "is not a JSON object"),
        ({}, r"experts: is not a number in 1-1024"),
        (spoilt("experts", 10**9), r"experts: is not a number"),
        (spoilt("experts", 3), r"load: expected 3 × 2 × 3 numbers in 0-1000"),
        (spoilt("sites", [1, 2]), r"sites: is not a list of names"),
        (spoilt("steps", ["1"]), r"steps: is not a list of steps"),
        (spoilt("steps", [1]), r"load: expected 1 × 2 × 2 numbers"),
        (spoilt("load", [[[0.5]]]), r"load: expected 3 × 2 × 2 numbers"),
        (spoilt("load", [[1], [1, 2]]), r"load: expected 3 × 2 × 2 numbers"),
        (spoilt("load", 10**400), r"load: expected 3 × 2 × 2 numbers"),
        (spoilt("load_by_task", None), r"load_by_task: expected 2 × 2 × 2 numbers"),
        (
            spoilt("load_by_task", [[[1001, 0], [0, 0]], [[0, 0], [0, 0]]]),
            r"load_by_task: expected 2 × 2 × 2 numbers in 0-1000",
        ),
        (spoilt("examples", [3]), r"examples\[0\]\.input: "),
        (
            spoilt("examples", [PICTURE["examples"][0] | {"routes": 3}]),
            r"examples\[0\]: expected a test, its number, and routes, a list",
        ),
        (
            spoilt(
                "examples",
                [PICTURE["examples"][0] | {"routes": [{"input": [[0, 2]], "answer": [[1]]}]}],
            ),
            r"examples\[0\]\.routes\[0\]\.input: expected an expert below 2 for each cell",
        ),
    ],
)
def test_a_spoilt_file_is_named(path: Path, picture: Any, message: str) -> None:
    path.write_text(json.dumps(picture), encoding="utf-8")
    with pytest.raises(ValueError, match=r"routing\.json[^\0]*" + message):
        write_report(path.parent)


def test_drawing_needs_no_torch() -> None:
    code = "import sys, tiny_onn.arc.route_view; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
