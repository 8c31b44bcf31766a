"""How a run looks while it goes on: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from tiny_onn.arc.training import TrainingRun


LINE_SECONDS = 15.0
"""Seconds between two plain lines."""


class RunDisplay:
    """Shows training and decoding; use it as a context manager.

    Args:
        console: where to draw. A terminal gets a live panel, anything else a line now and then.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task("training", total=1.0, left="")
        self._figures: dict[str, str] = {}
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
        self._last_line = 0.0
        self._smooth: dict[str, float] = {}

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def on_step(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        """Take in one training step."""
        for name in ("loss", "accuracy", "tokens_per_second", "shaping_share", "routing_entropy"):
            self._average(name, metrics.get(name))
        left = run.seconds * (1 / run.progress - 1) if run.progress > 0 else 0.0
        self._figures = {
            "step": f"{run.step:,}",
            "loss": self._text("loss", "{:.4f}"),
            "right tokens": self._text("accuracy", "{:.1%}"),
            "tokens": f"{run.tokens:,}",
            "tokens/s": self._text("tokens_per_second", "{:,.0f}"),
            "shaping share": self._text("shaping_share", "{:.1%}"),
            "routing entropy": self._text("routing_entropy", "{:.3f}"),
            "sync rate": f"{metrics.get('sync_rate', 0.0):.2f}",
        }
        self._show("training", run.progress, f"{clock(left)} left")

    def on_decode(self, done: int, total: int) -> None:
        """Take in how far decoding is."""
        self._show("decoding", done / total, f"{done:,} of {total:,} views")

    def _show(self, phase: str, progress: float, left: str) -> None:
        self._bar.update(self._task, description=phase, completed=progress, left=left)
        now = time.monotonic()
        done = phase == "decoding" and progress >= 1
        if self.console.is_terminal or (now - self._last_line < LINE_SECONDS and not done):
            return
        self._last_line = now
        figures = ", ".join(f"{name} {value}" for name, value in self._figures.items())
        text = figures if phase == "training" else left
        self.console.print(f"{phase} {progress:.0%}, {text}", highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3))
        for row in (list(self._figures)[:4], list(self._figures)[4:]):
            table.add_row(*(f"[dim]{name}[/] {self._figures[name]}" for name in row))
        return Group(self._bar, table)

    def _average(self, name: str, value: float | None) -> None:
        if value is not None:
            self._smooth[name] = 0.9 * self._smooth.get(name, value) + 0.1 * value

    def _text(self, name: str, form: str) -> str:
        return form.format(self._smooth[name]) if name in self._smooth else "-"


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
