"""A training run: batches, schedule, trainer and metrics, with a state that can be saved.

The run is what a checkpoint holds: restored, it goes on with the same batches, rates and dropout
masks as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from tiny_onn.arc.batches import DemonstrationStream
from tiny_onn.arc.checkpoints import Checkpoints
from tiny_onn.arc.metrics import Metrics
from tiny_onn.arc.recipe import Recipe, set_learning_rates
from tiny_onn.arc.routes import RouteLog
from tiny_onn.arc.schedule import Schedule
from tiny_onn.arc.tasks import Task
from tiny_onn.arc.trainer import ARCTrainer, StepResult
from tiny_onn.models import TinyOnnForCausalLM

_COUNTERS = ("seconds", "tokens", "computed_tokens", "passes", "bad_steps")


class TrainingError(RuntimeError):
    """A run that cannot go on, with what to do about it."""


class TrainingRun:
    """Joint training of one model on the demonstrations of some tasks.

    Args:
        tasks: the i-th task gets row i of the task embedding.
        recipe: all settings.
        device: where the model lives.
        optimizer: makes another optimizer of the model than the recipe's.
        clock: seconds of work, by which the schedule goes.

    Attributes:
        model: the model; metrics: the last step's figures.
        seconds: training time so far; tokens: tokens trained on so far, without padding;
        computed_tokens: the same with padding; routes: what is logged of the routes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        recipe: Recipe,
        device: str = "cpu",
        *,
        optimizer: Callable[[TinyOnnForCausalLM], Optimizer] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.recipe = recipe
        self.task_ids = [task.id for task in tasks]
        self.model = recipe.model.build(len(tasks), recipe.seed)
        self.stream = DemonstrationStream(tasks, recipe.batches, recipe.seed)
        # Plain matrix products beat everything else on a CPU while rows are short.
        short = device == "cpu" and self.stream.row_tokens <= 128
        self.model.set_attn_implementation("eager" if short else "sdpa")
        self.model.to(device)
        self.optimizer = (optimizer or recipe.optimizer.build)(self.model)
        self._clock = clock
        self.shaper = recipe.shaping.build(self.model)
        self.trainer = ARCTrainer(
            self.model,
            self.optimizer,
            self.shaper,
            seed=recipe.seed,
            clip=recipe.training.clip,
            precision=recipe.training.precision,
        )
        self.routes = RouteLog(self.trainer, self.shaper, self.stream, len(tasks))
        self.schedule = Schedule(recipe.schedule)
        self.seconds = 0.0
        self.tokens = 0
        self.computed_tokens = 0
        self.passes = 0
        self.bad_steps = 0
        self._bad_in_a_row = 0

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.trainer.step

    @property
    def finished(self) -> bool:
        """Whether the schedule has run out."""
        return self.schedule.finished(self.step)

    @property
    def progress(self) -> float:
        """How much of the run is over, 0-1."""
        return self.schedule.progress(self.step, self.seconds)

    def train(self, checkpoints: Checkpoints | None = None) -> Iterator[Metrics]:
        """Train to the end of the schedule, yielding each step's metrics.

        Raises:
            TrainingError: after ``max_bad_steps`` steps in a row that were not finite.
        """
        every = self.recipe.training.checkpoint_every
        while not self.finished:
            yield self._advance()
            due = self.finished or (every and self.step % every == 0)
            # While steps fail the last good checkpoint is worth more than a new one.
            if checkpoints is not None and due and not self._bad_in_a_row:
                self.save(checkpoints)

    def save(self, checkpoints: Checkpoints) -> Path:
        """Save a checkpoint of this very moment."""
        return checkpoints.save(self.step, self.model, self.optimizer, self._state())

    def restore(self, checkpoints: Checkpoints, path: Path) -> None:
        """Go on from a checkpoint of the same recipe and tasks."""
        state = checkpoints.restore(path, self.model, self.optimizer)
        if state["task_ids"] != self.task_ids:
            raise ValueError(
                f"{path} was trained on other tasks: {len(state['task_ids'])} of them, "
                f"{len(set(state['task_ids']) & set(self.task_ids))} in common with the "
                f"{len(self.task_ids)} chosen now"
            )
        self.trainer.step = int(state["step"])
        self.stream.load_state_dict(state["stream"])
        self.schedule.load_state_dict(state["schedule"])
        self.shaper.load_state_dict(state["shaping"])
        if "routes" in state:  # A checkpoint from before there was a log of them has none.
            self.routes.load_state_dict(state["routes"])
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "task_ids": self.task_ids,
            "stream": self.stream.state_dict(),
            "schedule": self.schedule.state_dict(),
            "shaping": self.shaper.state_dict(),
            "routes": self.routes.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def _advance(self) -> Metrics:
        start = self._clock()
        self.schedule.update(self.step, self.seconds)
        factor = self.schedule.factor(self.step)
        set_learning_rates(self.optimizer, factor)
        batch = self.stream.next_batch().to(self.model.device)
        result = self.trainer.train_step(batch)
        elapsed = self._clock() - start
        self.seconds += elapsed
        self.tokens += batch.real_tokens
        self.computed_tokens += batch.input_ids.numel()
        self.passes += result.passes
        self._count_bad(result)
        metrics: Metrics = {
            "step": self.step,
            "loss": result.loss,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(batch.real_tokens / elapsed, 1),
            "padding": round(1 - batch.real_tokens / batch.input_ids.numel(), 4),
            "accuracy": result.accuracy,
            "shaping": result.shaping,
            "shaping_share": result.shaping / result.loss if result.loss else 0.0,
            "grad_norm": result.grad_norm,
            "lr": self.recipe.optimizer.lr * factor,
            "sync_rate": round(self.passes / self.step - 1, 4),
            **self.shaper.diagnostics,
        }
        if result.skipped:
            metrics |= {"skipped": True, "loss": None, "shaping": None, "shaping_share": None}
            metrics["grad_norm"] = None
        else:
            metrics |= self.routes.look(batch)
        return metrics

    def _count_bad(self, result: StepResult) -> None:
        self.bad_steps += result.skipped
        self._bad_in_a_row = self._bad_in_a_row + 1 if result.skipped else 0
        if self._bad_in_a_row >= self.recipe.training.max_bad_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self._bad_in_a_row} steps in a row, up to "
                f"step {self.step}. The last good checkpoint is kept; try a lower optimizer.lr"
            )


StepObserver = Callable[[TrainingRun, Metrics], None]
