"""The learning-rate schedule of a run that ends after so many steps, or so many minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_MINUTES = 8.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, a constant stretch, and a linear cool-down to zero.

    Attributes:
        steps: optimizer steps of the whole run, or None.
        minutes: wall-clock minutes of training, or None. With both, what runs out first ends it;
            with neither the run takes 8 minutes.
        warmup_steps: steps over which the rate rises linearly.
        cooldown: share of the run over which the rate falls linearly to zero.
    """

    steps: int | None = None
    minutes: float | None = None
    warmup_steps: int = 20
    cooldown: float = 0.2

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1. Got {self.steps}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be more than 0. Got {self.minutes}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative. Got {self.warmup_steps}")
        if not 0 <= self.cooldown < 1:
            raise ValueError(f"cooldown must be in 0-1. Got {self.cooldown}")


class Schedule:
    """Decides the rate of each step and when to stop.

    The clock is asked one question only: when does the cool-down begin? Until then the rate
    depends on the step alone, so that two runs of one seed agree step by step whatever the
    machine's speed; from then on the number of remaining steps is fixed.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        unlimited = config.steps is None and config.minutes is None
        self.minutes = DEFAULT_MINUTES if unlimited else config.minutes
        self.end: int | None = config.steps
        self.cooldown_start: int | None = None

    def update(self, step: int, seconds: float) -> None:
        """Look at the clock before step ``step`` (from 0), after ``seconds`` of training."""
        if self.cooldown_start is None and self.progress(step, seconds) >= 1 - self.config.cooldown:
            self.cooldown_start = step
            if self.config.steps is None or not self._by_steps(step, seconds):
                self.end = step + max(1, round(step * self._cooldown_per_step()))

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0-1."""
        if self.cooldown_start is not None and self.end is not None:
            return min(1.0, step / self.end)
        steps = self.config.steps
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_clock, step / steps if steps else 0.0)

    def finished(self, step: int) -> bool:
        """Whether ``step`` steps are all there are."""
        return self.end is not None and step >= self.end

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with in step ``step`` (from 0)."""
        warm = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        if self.cooldown_start is None or self.end is None:
            return warm
        return warm * (self.end - step) / max(1, self.end - self.cooldown_start)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same rates."""
        return {
            "end": self.end,
            "cooldown_start": self.cooldown_start,
            "length": [self.config.steps, self.minutes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`. A run that has been given another length
        since then leaves its cool-down and has one at its new end."""
        if state["length"] == [self.config.steps, self.minutes]:
            self.end, self.cooldown_start = state["end"], state["cooldown_start"]

    def _by_steps(self, step: int, seconds: float) -> bool:
        assert self.config.steps is not None
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return step / self.config.steps >= by_clock

    def _cooldown_per_step(self) -> float:
        """Cool-down steps for each step before it."""
        return self.config.cooldown / (1 - self.config.cooldown)
