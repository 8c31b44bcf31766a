"""The routes of an ARC run, as the shaping study looks at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tiny_onn.arc import load_tasks
from tiny_onn.arc.batches import Batch, DemonstrationStream
from tiny_onn.arc.losses import arc_loss, shift
from tiny_onn.arc.recipe import ShapingRecipe
from tiny_onn.arc.training import TrainingRun
from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.shaping import RoutingMonitor, RoutingShaper
from tiny_onn.studies.signal import CostRecorder, mean_of

PROBE_EVERY, FRESH_BATCHES, FRESH_SEED = 10, 8, 999


@dataclass(frozen=True)
class Shaping(ShapingRecipe):
    """A recipe's shaping with any options of the strategy."""

    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: TinyOnnForCausalLM) -> RoutingShaper:
        """A shaper of the model's sites."""
        return RoutingShaper(model, self.strategy, self.w_meta, **self.options)


class Routes:
    """Looks at the routes of a run.

    Args:
        record: whether to note the experts' costs at every step, too.
    """

    def __init__(self, record: bool) -> None:
        self._record = record
        self._recorder: CostRecorder | None = None
        self._monitor: RoutingMonitor | None = None
        self._fresh: list[Batch] = []
        self._jitters: list[float | None] = []

    def look(self, run: TrainingRun) -> None:
        """Call after each step, off the clock."""
        if self._monitor is None:
            self._begin(run)
        assert self._monitor is not None
        if run.step % PROBE_EVERY == 0:
            batch = self._fresh[0]
            with torch.no_grad():
                self._monitor.probe(_logits(run, batch), batch.segment_ids >= 0)
            self._jitters.append(self._monitor.summary().get("jitter"))
        if self._recorder is not None:
            batch = self._fresh[run.step % len(self._fresh)]
            outputs = run.trainer.forward(batch)
            loss = arc_loss(shift(outputs.logits, batch.labels, batch.weights))
            kept = (batch.segment_ids >= 0).flatten().nonzero().squeeze(-1)
            logits = [x_NE.detach() for x_NE in outputs.router_logits]
            self._recorder.note(logits, run.optimizer, loss, kept)

    def figures(self, run: TrainingRun) -> dict[str, float]:
        """The monitor's figures on fresh views of the tasks (``jitter`` is the mean over the run),
        and the recorder's."""
        assert self._monitor is not None
        with torch.no_grad():
            for batch in self._fresh:
                self._monitor.update(
                    _logits(run, batch),
                    batch.segment_ids >= 0,
                    groups=batch.task_ids,
                    views=batch.symmetry_ids,
                )
        recorded = self._recorder.figures() if self._recorder is not None else {}
        return self._monitor.summary() | {"jitter": mean_of(self._jitters)} | recorded

    def _begin(self, run: TrainingRun) -> None:
        tasks = list(load_tasks("arcagi", ids=run.task_ids))
        stream = DemonstrationStream(tasks, run.recipe.batches, FRESH_SEED)
        self._fresh = [stream.next_batch() for _ in range(FRESH_BATCHES)]
        top_k = run.model.model.experts_per_site
        self._monitor = RoutingMonitor(top_k, num_groups=len(tasks))
        if self._record:
            self._recorder = CostRecorder(run.model, run.shaper.sites)


def _logits(run: TrainingRun, batch: Batch) -> list[torch.Tensor]:
    return list(run.trainer.forward(batch).router_logits)
