"""How long things take, side by side: candidates take turns, so that a busy moment hits all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, taken in turns.

    Args:
        candidates: calls without arguments.
        rounds: timed calls of each; every round runs all candidates once, in a new order.
        warmup: rounds that are not timed.
        seed: of the order.
    """
    order, shuffle = list(candidates), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for i in range(warmup + rounds):
        shuffle(order)
        for name in order:
            took = _seconds(candidates[name])
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """Median seconds of one call of each candidate, taken in turns: see :func:`take_turns`."""
    seconds = take_turns(candidates, rounds=rounds, warmup=warmup, seed=seed)
    return {name: statistics.median(seconds[name]) for name in candidates}


def _seconds(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
