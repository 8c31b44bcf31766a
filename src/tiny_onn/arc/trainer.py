"""The trainer: one optimizer step from one packed batch, shaping inside the closure."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.arc.batches import Batch
from tiny_onn.arc.losses import arc_loss, shift, token_accuracy
from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.optim.newton_schulz import auto_dtype
from tiny_onn.shaping import RoutingShaper, RoutingStatistics, routing_statistics

Precision = Literal["auto", "float32", "bfloat16"]


class NotFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; host numbers.

    Attributes:
        loss: main loss of the first pass, nats a predicted token.
        shaping: weighted routing loss of the first pass.
        accuracy: share of the predicted tokens that are right, in training mode.
        grad_norm: norm of the last pass's gradient before clipping.
        passes: forward-backward passes taken, 2 when a sharpness-aware step was run.
        skipped: True if the step was given up because something was not finite.
    """

    loss: float
    shaping: float
    accuracy: float
    grad_norm: float
    passes: int
    skipped: bool = False


class ARCTrainer:
    """Trains a model on packed batches of demonstrations.

    Args:
        model: the model; it stays where it is.
        optimizer: called with a closure that may run twice on the same batch.
        shaper: adds the routing loss, or None.
        seed: with the number of the step it decides the dropout masks.
        clip: largest gradient norm, 0 for none.
        precision: ``"bfloat16"`` runs the model under autocast; ``"auto"`` does so where the
            hardware multiplies bfloat16 matrices natively.

    Attributes:
        step: number of steps taken or skipped so far.
        routing: statistics of the last batch's routes, on demand.
    """

    def __init__(
        self,
        model: TinyOnnForCausalLM,
        optimizer: Optimizer,
        shaper: RoutingShaper | None = None,
        *,
        seed: int = 0,
        clip: float = 1.0,
        precision: Precision = "auto",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.shaper = shaper
        self.seed = seed
        self.clip = clip
        self.precision = precision
        self.step = 0
        self._router_logits: tuple[Tensor, ...] = ()
        self._mask: Tensor | None = None

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step; the closure zeroes, runs forward and backward, and returns the loss.

        A loss or gradient that is not finite leaves parameters and optimizer state untouched and
        is reported as skipped.
        """
        passes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            main, shaping, accuracy = self._losses(batch)
            loss = main + shaping
            loss.backward()
            norm = self._clip()
            if not math.isfinite(norm + loss.item()):
                raise NotFiniteError
            passes.append((main.detach(), shaping.detach(), accuracy, torch.tensor(norm)))
            return loss.detach()

        self.model.train()
        torch.manual_seed((self.seed << 32) + self.step)
        self.step += 1
        try:
            self.optimizer.step(closure)
        except NotFiniteError:
            self.optimizer.zero_grad()
            return StepResult(math.nan, math.nan, 0.0, math.nan, len(passes) + 1, skipped=True)
        main, shaping, accuracy, _ = (float(x) for x in passes[0])
        return StepResult(main, shaping, accuracy, float(passes[-1][3]), len(passes))

    def routing(self) -> RoutingStatistics:
        """Statistics of the last batch's routes."""
        top_k = self.model.model.experts_per_site
        return routing_statistics(self._router_logits, top_k, self._mask)

    @property
    def last_routes(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Raw router logits ``[N, E]`` of the last batch, one a site, in no graph, and its mask."""
        return self._router_logits, self._mask

    def forward(self, batch: Batch) -> Any:
        """The model's outputs for a batch, router logits among them, in the trainer's precision."""
        with self._autocast():
            return self.model(
                input_ids=batch.input_ids,
                segment_ids=batch.segment_ids,
                task_ids=batch.task_ids,
                symmetry_ids=batch.symmetry_ids,
                output_router_logits=True,
                use_cache=False,
            )

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        mask = batch.segment_ids >= 0
        outputs = self.forward(batch)
        logits, shaping = outputs.router_logits, None
        if self.shaper is not None and not self.shaper.needs_main_loss:
            shaping = self.shaper.calculate_meta_loss(logits, self.optimizer, mask)
        predictions = shift(outputs.logits, batch.labels, batch.weights)
        main = arc_loss(predictions)
        if self.shaper is not None and shaping is None:
            shaping = self.shaper.calculate_meta_loss(logits, self.optimizer, mask, main)
        if shaping is None:
            shaping = torch.zeros_like(main)
        self._router_logits = tuple(x_NE.detach() for x_NE in logits)
        self._mask = mask
        return main, shaping, token_accuracy(predictions)

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        bound = self.clip or math.inf
        return float(nn.utils.clip_grad_norm_(parameters, bound))

    def _autocast(self) -> AbstractContextManager[object]:
        device = self.model.device
        return torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(self.precision, device)
        )


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16: where asked to, or where the hardware does so natively."""
    if precision == "auto":
        return auto_dtype(device) == torch.bfloat16
    return precision == "bfloat16"
