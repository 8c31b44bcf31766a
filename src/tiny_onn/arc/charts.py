"""Line charts of a run's metrics, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Chart:
    """What to draw: `series` maps keys of the metrics to names; `unit` labels the y axis.

    `percent`: values are shares, shown in per cent. `log`: logarithmic y axis, where all values
    allow it. `zero`: the y axis begins at 0, unless it is logarithmic.
    """

    title: str
    unit: str
    series: Mapping[str, str]
    percent: bool = False
    log: bool = False
    zero: bool = False


CHARTS = (
    Chart("Loss", "nats per token", {"loss": "training", "held_out_loss": "held out"}, log=True),
    Chart(
        "Token accuracy",
        "predicted tokens that are right",
        {"accuracy": "training", "held_out_accuracy": "held out"},
        percent=True,
    ),
    Chart(
        "Routing entropy",
        "share of the largest possible",
        {"routing_entropy": "per token", "load_entropy": "of the load"},
        percent=True,
    ),
    Chart(
        "Busy and idle experts",
        "share of the routes, share of the experts",
        {"top_share": "busiest", "dead_experts": "idle"},
        percent=True,
        zero=True,
    ),
    Chart(
        "Distance of routes",
        "Jensen-Shannon distance, 0 to 1",
        {"jitter": "jitter", "consistency": "within a task"},
        zero=True,
    ),
    Chart(
        "What a route tells of the task",
        "mutual information, bits",
        {"mutual_information": "expert and task"},
        zero=True,
    ),
    Chart(
        "Routing shaping",
        "shaping loss over main loss",
        {"shaping_share": "share"},
        percent=True,
        zero=True,
    ),
    Chart("Throughput", "tokens per second", {"tokens_per_second": "training"}, zero=True),
    Chart(
        "Sharpness-aware passes",
        "share of the steps so far",
        {"sync_rate": "rate"},
        percent=True,
        zero=True,
    ),
    Chart("Gradient norm", "before clipping", {"grad_norm": "norm"}, log=True),
    Chart("Learning rate", "of the matrices", {"lr": "rate"}, zero=True),
)
"""What the report draws of a run, where its metrics hold it."""

_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 60, 42, 38
_MAX_POINTS = 160
# Far from where sums overflow and logarithms fail; a run that gets there has nothing to show.
_LARGEST, _SMALLEST = 1e100, 1e-100
_STROKES = (("var(--line-1,#2563EB)", ""), ("var(--line-2,#B45309)", ' stroke-dasharray="5 3"'))


class _Point(NamedTuple):
    """Neighbouring steps as one point: mean, smallest and largest value."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Scale:
    """Where a value stands, in pixels, and what its axis is marked with."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        bend: Callable[[float], float] = math.log if self.log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def history_svg(rows: Sequence[Mapping[str, Any]], chart: Chart) -> str:
    """Draw one chart of metrics rows over their `step`, as one inline `<svg>` element.

    A line is the mean of neighbouring steps, the band around it their smallest and largest value.
    A row without a number under a key, or with one that is not finite or beyond 1e100, is no point
    of it. Returns "" when there is no point at all, or nothing but zeros.
    """
    lines = {name: _points(rows, key) for key, name in chart.series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not any(point.high or point.low for points in lines.values() for point in points):
        return ""
    x_scale = _x_scale([point.x for points in lines.values() for point in points])
    y_scale = _y_scale([p for points in lines.values() for p in points], chart)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}"'
        f' height="{_HEIGHT}" xmlns="http://www.w3.org/2000/svg" font-family="inherit"'
        f' font-size="11" fill="currentColor"><title>{escape(_summary(chart, lines))}</title>',
        f'<text x="0" y="13" font-size="14" font-weight="600">{escape(chart.title)}</text>',
        f'<text x="0" y="29" opacity=".7">{escape(_unit(chart, y_scale))}</text>',
        *_axes(x_scale, y_scale, chart.percent),
        *_legend(list(lines)),
    ]
    for stroke, points in zip(_STROKES, lines.values(), strict=False):
        parts += _line(points, x_scale, y_scale, stroke)
    parts += _last_values(list(lines.values()), x_scale, y_scale, chart.percent)
    return "".join([*parts, "</svg>"])


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[_Point]:
    found = [(float(row["step"]), _value(row[key])) for row in rows if _is_drawn(row.get(key))]
    size = math.ceil(len(found) / _MAX_POINTS) or 1
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [_merge(group) for group in groups]


def _is_drawn(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST <= value <= _LARGEST


def _value(number: float) -> float:
    return float(number) if abs(number) >= _SMALLEST else 0.0


def _merge(group: Sequence[tuple[float, float]]) -> _Point:
    values = [y for _, y in group]
    x = math.fsum(x for x, _ in group) / len(group)
    return _Point(x, math.fsum(values) / len(values), min(values), max(values))


def _x_scale(steps: Sequence[float]) -> _Scale:
    high = max(*steps, 1.0)
    ticks = [tick for tick in _linear_ticks(0, high) if tick <= high and tick == int(tick)]
    return _Scale(0.0, high, _LEFT, _WIDTH - _RIGHT, ticks)


def _y_scale(points: Sequence[_Point], chart: Chart) -> _Scale:
    """An axis that holds every mean; a band that goes beyond is cut off at its ends."""
    low, high = min(p.y for p in points), max(p.y for p in points)
    log = chart.log and low > 0 and high > 4 * low
    if chart.zero and not log:
        low = min(low, 0.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    ticks = _log_ticks(low, high) if log else _linear_ticks(low, high)
    return _Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, ticks, log)


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, a step of 1, 2 or 5 times a power of ten, that enclose a range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5 times a power of ten that enclose a range, powers of ten alone if many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    first = max(i for i, tick in enumerate(every) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(every) if tick >= high * (1 - 1e-9))
    ticks = every[first : last + 1]
    if len(ticks) <= 7:
        return ticks
    return [10.0**power for power in powers]


def _axes(x_scale: _Scale, y_scale: _Scale, percent: bool) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick in y_scale.ticks:
        y = y_scale(tick)
        yield f'<path d="M{_LEFT} {y}H{right}" stroke="currentColor" stroke-opacity=".15"/>'
        yield _label(_LEFT - 6, y + 4, _number(tick, percent), "end")
    for tick in x_scale.ticks:
        yield _label(x_scale(tick), bottom + 15, _number(tick), "middle")
    yield _label((_LEFT + right) / 2, _HEIGHT - 5, "step", "middle")


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" opacity=".7">{escape(text)}</text>'


def _legend(names: Sequence[str]) -> Iterator[str]:
    """Names in a row at the top right, where there is more than one line."""
    x = float(_WIDTH)
    for (colour, dash), name in reversed(list(zip(_STROKES, names, strict=False))):
        if len(names) > 1:
            x -= 6 * len(name)
            yield _label(x, 13, name, "start")
            yield f'<path d="M{x - 24:g} 9h18" stroke="{colour}" stroke-width="2"{dash}/>'
            x -= 36


def _line(
    points: Sequence[_Point], x_scale: _Scale, y_scale: _Scale, stroke: tuple[str, str]
) -> Iterator[str]:
    colour, dash = stroke
    upper = [f"{x_scale(p.x):g} {y_scale(p.high):g}" for p in points]
    lower = [f"{x_scale(p.x):g} {y_scale(p.low):g}" for p in reversed(points)]
    middle = [f"{x_scale(p.x):g} {y_scale(p.y):g}" for p in points]
    if any(p.low < p.high for p in points):
        yield f'<path fill="{colour}" fill-opacity=".16" d="M{"L".join(upper + lower)}z"/>'
    if len(points) > 1:
        yield (
            f'<path class="line" fill="none" stroke="{colour}" stroke-width="1.8"'
            f' stroke-linejoin="round"{dash} d="M{"L".join(middle)}"/>'
        )
    x, y = middle[-1].split()
    yield f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'


def _last_values(
    lines: Sequence[Sequence[_Point]], x_scale: _Scale, y_scale: _Scale, percent: bool
) -> Iterator[str]:
    """Each line's last value at its end; one that would overlap the one above moves down."""
    lowest = -math.inf
    for last in sorted((points[-1] for points in lines), key=lambda point: -point.y):
        lowest = max(y_scale(last.y) + 4, lowest + 12)
        text = escape(_number(last.y, percent))
        yield f'<text x="{x_scale(last.x) + 6:g}" y="{lowest:g}" font-weight="600">{text}</text>'


def _unit(chart: Chart, y_scale: _Scale) -> str:
    return f"{chart.unit}, logarithmic" if y_scale.log else chart.unit


def _summary(chart: Chart, lines: Mapping[str, Sequence[_Point]]) -> str:
    """What the chart shows, in words, for whom cannot see it."""
    ends = [
        f"{name} from {_number(points[0].y, chart.percent)} to"
        f" {_number(points[-1].y, chart.percent)}"
        for name, points in lines.items()
    ]
    return f"{chart.title} ({chart.unit}): {'; '.join(ends)}"


def _number(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
