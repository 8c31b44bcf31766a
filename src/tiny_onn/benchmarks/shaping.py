"""What shaping the routes costs in time and memory: FARS beside SARS and the balance loss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from tiny_onn.benchmarks import peers
from tiny_onn.benchmarks.peers import Size
from tiny_onn.benchmarks.timing import synchronize, take_turns
from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.shaping import FisherShaper, RoutingShaper

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "ars2neo": lambda model: ARS2Neo(param_groups(model), lr=1e-3),
    "adamw": lambda model: AdamW(model.parameters(), lr=1e-3),
}
MEASURED = ("fars", "sars", "balance")


def bench_shaping(*, rounds: int = 15, sizes: Mapping[str, Size] = peers.SIZES) -> dict[str, Any]:
    """Time and memory that shaping adds to a training step (forward, loss, backward, update).

    The strategies take turns. ``fars_ms``, ``sars_ms`` and ``balance_ms`` are everything that is
    computed because of the strategy: reading the optimizer's moments once, the routing loss, its
    gradient down to the logits, and SARS's own backward pass; not what SARS's observers take in the
    forward. ``*_share`` is that over a step without shaping. ``*_extra_bytes`` is by how much the
    most that the allocator held at a time in a step was more than without shaping.

    Args:
        rounds: timed steps of each strategy.
        sizes: by name.

    Returns:
        ``{size: {optimizer: {"step_ms", "fars_ms", "fars_share", …}}}``.
    """
    return {
        name: {kind: bench_optimizer(size, make, rounds) for kind, make in OPTIMIZERS.items()}
        for name, size in sizes.items()
    }


def bench_optimizer(
    size: Size, make: Callable[[nn.Module], Optimizer], rounds: int
) -> dict[str, float]:
    """All figures of one size and optimizer."""
    steps = {name: Step(size, make, name) for name in ("none", *MEASURED)}
    seconds = take_turns({name: step.run for name, step in steps.items()}, rounds=rounds, warmup=3)
    step_s, peak = statistics.median(seconds["none"]), steps["none"].peak_bytes()
    result = {"step_ms": 1e3 * step_s}
    for name in MEASURED:
        shaping_s = statistics.median(steps[name].shaping_s[-rounds:])
        result[f"{name}_ms"] = 1e3 * shaping_s
        result[f"{name}_share"] = shaping_s / step_s
        result[f"{name}_extra_bytes"] = steps[name].peak_bytes() - peak
    return result | {
        "sars_over_fars": result["sars_ms"] / result["fars_ms"],
        "experts": sum(site.num_experts for site in steps["none"].shaper.sites),
    }


class Step:
    """Training steps of a model of its own under one strategy.

    Attributes:
        shaping_s: seconds of each step that went into the strategy.
    """

    def __init__(self, size: Size, make: Callable[[nn.Module], Optimizer], strategy: str) -> None:
        torch.manual_seed(0)
        self.model: Any = peers.ours(size).train()
        self.optimizer = make(self.model)
        self.tokens = peers.random_tokens(size)
        self.shaper = RoutingShaper(self.model, strategy)
        self.shaping_s: list[float] = []

    def run(self) -> None:
        """A step in which the strategy's part is computed apart, and timed."""
        out = self._forward()
        main = self._main_loss(out)
        logits = [x_NE.detach().requires_grad_() for x_NE in out.router_logits]
        synchronize()
        start = time.perf_counter()
        for strategy in self.shaper.strategies.values():
            if isinstance(strategy, FisherShaper):
                strategy.refresh()
        meta = self.shaper.calculate_meta_loss(logits, self.optimizer, None, main)
        if meta.requires_grad:
            meta.backward()
        synchronize()
        self.shaping_s.append(time.perf_counter() - start)
        main.backward()
        self.optimizer.step()

    def run_as_in_training(self) -> None:
        """A step as :class:`tiny_onn.arc.ARCTrainer` takes it."""
        out = self._forward()
        shape, logits = self.shaper.calculate_meta_loss, out.router_logits
        if self.shaper.needs_main_loss:
            main = self._main_loss(out)
            meta = shape(logits, self.optimizer, None, main)
        else:
            meta = shape(logits, self.optimizer)
            main = self._main_loss(out)
        (main + meta).backward()
        self.optimizer.step()

    def peak_bytes(self) -> int:
        """The most bytes that were allocated at a time in a step, beyond those before it."""
        self.run_as_in_training()
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run_as_in_training()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.run_as_in_training()
        assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
        held = most = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    def _forward(self) -> Any:
        self.optimizer.zero_grad()
        return self.model(input_ids=self.tokens, use_cache=False, output_router_logits=True)

    def _main_loss(self, out: Any) -> Tensor:
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())
