"""Joint test-time training: learn the demonstrations of all tasks, then answer their tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tiny_onn.arc.checkpoints import Checkpoints
from tiny_onn.arc.decode import Decoded, decode, make_prompts
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.metrics import MetricsLog, TensorBoardLog
from tiny_onn.arc.recipe import Recipe
from tiny_onn.arc.tasks import Task
from tiny_onn.arc.trainer import uses_bfloat16
from tiny_onn.arc.training import StepObserver, TrainingRun
from tiny_onn.arc.vote import Candidate, attempts, count_votes, rescore


class StoppedError(RuntimeError):
    """The run was asked to stop; its checkpoint holds everything up to that step."""


@dataclass(frozen=True)
class Solution:
    """What a run found.

    Attributes:
        attempts: up to two answers for every test input of every task, by task id.
        candidates: all answers of the votes, the attempts first, by task id and test input.
        train_seconds, decode_seconds: wall-clock time of the two halves.
        steps, tokens: optimizer steps, and tokens trained on, without padding.
        padding: share of the computed tokens that were padding.
        parameters: size of the model.
    """

    attempts: dict[str, list[list[Grid]]]
    candidates: dict[str, list[list[Candidate]]]
    train_seconds: float
    decode_seconds: float
    steps: int
    tokens: int
    padding: float
    parameters: int

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second, without padding."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0


def solve(
    tasks: Sequence[Task],
    recipe: Recipe | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_start: Callable[[], None] = lambda: None,
    on_step: StepObserver | None = None,
    on_decode: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Solution:
    """Train one model on the tasks' demonstrations and answer every test input twice.

    Args:
        tasks: their test pairs hold no outputs, so nothing here can reach an answer.
        recipe: all settings; its ``data`` section is not read.
        out: folder for ``metrics.jsonl``, ``routing.json`` and ``checkpoint/``; None writes
            nothing.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        device: where to compute.
        on_start: called once before the first step, after a checkpoint was found to fit.
        on_step: called after every training step.
        on_decode: called with (prompts decoded, prompts in all).
        stop: asked after every step; once true, a checkpoint is saved and training ends.

    Raises:
        ValueError: for no tasks, or a checkpoint that does not fit them.
        TrainingError: when training breaks down.
        StoppedError: when ``stop`` ended it.
    """
    run = train(
        tasks,
        recipe,
        out=out,
        resume=resume,
        device=device,
        on_start=on_start,
        on_step=on_step,
        stop=stop,
    )
    return solution(run, tasks, out=out, on_decode=on_decode)


def train(
    tasks: Sequence[Task],
    recipe: Recipe | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    on_start: Callable[[], None] = lambda: None,
    on_step: StepObserver | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingRun:
    """The first half of :func:`solve`, from the same arguments: a run that has been trained."""
    run = TrainingRun(tasks, recipe or Recipe(), device)
    checkpoints = None
    logs: list[MetricsLog | TensorBoardLog] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(out / "checkpoint")
        if not resume:
            checkpoints.clear()
        if (newest := checkpoints.latest()) is not None:
            run.restore(checkpoints, newest)
        logs.append(MetricsLog(out / "metrics.jsonl", run.step))
        if run.recipe.training.tensorboard:
            logs.append(TensorBoardLog(out / "tensorboard"))
    try:
        on_start()
        for metrics in run.train(checkpoints):
            for log in logs:
                log.write(metrics)
            if on_step is not None:
                on_step(run, metrics)
            if stop():
                if checkpoints is not None:
                    run.save(checkpoints)
                raise StoppedError(f"stopped after step {run.step}")
    finally:
        for log in logs:
            log.close()
    return run


def trained(
    tasks: Sequence[Task], recipe: Recipe, out: Path, *, device: str = "cpu"
) -> TrainingRun:
    """The run whose newest checkpoint is in ``out``.

    Raises:
        ValueError: if there is none, or it is of other tasks or another model.
    """
    checkpoints = Checkpoints(out / "checkpoint")
    newest = checkpoints.latest()
    if newest is None:
        raise ValueError(f"{out}: there is no checkpoint")
    run = TrainingRun(tasks, recipe, device)
    run.restore(checkpoints, newest)
    return run


def solution(
    run: TrainingRun,
    tasks: Sequence[Task],
    *,
    ids: Collection[str] | None = None,
    out: Path | None = None,
    on_decode: Callable[[int, int], None] | None = None,
) -> Solution:
    """The second half of :func:`solve`: answer the test inputs of the run's tasks.

    Args:
        tasks: all tasks of the run; ids: those to answer, all by default.
        out, on_decode: see :func:`solve`.
    """
    start = time.perf_counter()
    candidates = answer(run, tasks, ids, on_decode)
    decode_seconds = time.perf_counter() - start
    if out is not None:
        run.routes.write(out / "routing.json", tasks, candidates)
    return Solution(
        attempts={key: [attempts(c) for c in tests] for key, tests in candidates.items()},
        candidates=candidates,
        train_seconds=run.seconds,
        decode_seconds=decode_seconds,
        steps=run.step,
        tokens=run.tokens,
        padding=1 - run.tokens / run.computed_tokens if run.computed_tokens else 0.0,
        parameters=sum(p.numel() for p in run.model.parameters()),
    )


def answer(
    run: TrainingRun,
    tasks: Sequence[Task],
    ids: Collection[str] | None = None,
    on_decode: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[Candidate]]]:
    """Decode the test inputs under many views and rank the answers, best first; arguments as of
    :func:`solution`."""
    recipe = run.recipe
    asked = [(i, task) for i, task in enumerate(tasks) if ids is None or task.id in ids]
    prompts = make_prompts(
        tasks, recipe.decode, seed=recipe.seed, keep_background=recipe.batches.keep_background
    )
    prompts = [prompt for prompt in prompts if ids is None or tasks[prompt.task].id in ids]
    enabled = uses_bfloat16(recipe.training.precision, run.model.device)
    with torch.autocast(run.model.device.type, dtype=torch.bfloat16, enabled=enabled):
        decoded = decode(run.model, prompts, recipe.decode, on_progress=on_decode)
        return {
            task.id: [
                _ranked(run, [d for d in decoded if (d.prompt.task, d.prompt.test) == (i, j)])
                for j in range(len(task.test))
            ]
            for i, task in asked
        }


def _ranked(run: TrainingRun, decoded: Sequence[Decoded]) -> list[Candidate]:
    """The answers to one test input: the most voted are ordered by their mean log-probability."""
    candidates = count_votes(decoded)
    config = run.recipe.decode
    first = candidates[: config.rescored]
    if len(first) < 2 or not config.rescoring_views:
        return candidates
    prompts = [d.prompt for d in decoded[: config.rescoring_views]]
    return rescore(run.model, first, prompts, config.batch_tokens) + candidates[config.rescored :]
