"""From many decoded views to two attempts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiny_onn.arc.decode import Decoded, Prompt, log_likelihoods
from tiny_onn.arc.grids import Grid
from tiny_onn.models import TinyOnnForCausalLM


@dataclass(frozen=True)
class Candidate:
    """An answer that at least one view gave.

    Attributes:
        grid: the answer, in the task's own frame.
        votes: how many views gave it.
        log_prob: mean log-probability, in nats: over the views that gave it, or over all views
            it was scored under.
    """

    grid: Grid
    votes: int
    log_prob: float


def count_votes(decoded: Sequence[Decoded]) -> list[Candidate]:
    """The distinct answers to one test input: most votes first, then the most probable.

    A view whose answer is not a grid has no vote.
    """
    found: dict[tuple[tuple[int, ...], bytes], list[Decoded]] = {}
    for answer in decoded:
        if answer.grid is not None:
            key = (answer.grid.shape, answer.grid.tobytes())
            found.setdefault(key, []).append(answer)
    candidates = []
    for group in found.values():
        grid = group[0].grid
        assert grid is not None
        mean = sum(answer.log_prob for answer in group) / len(group)
        candidates.append(Candidate(grid, len(group), mean))
    return sorted(candidates, key=lambda c: (-c.votes, -c.log_prob))


def rescore(
    model: TinyOnnForCausalLM,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    batch_tokens: int,
) -> list[Candidate]:
    """Order candidates by how probable they are under all of some views, not only under those
    that gave them (a product of experts over views).

    Args:
        prompts: the views of the test input to score under.
    """
    pairs = [(prompt, c) for c in candidates for prompt in prompts]
    scores = log_likelihoods(model, [p for p, _ in pairs], [c.grid for _, c in pairs], batch_tokens)
    rescored = []
    for i, candidate in enumerate(candidates):
        own = scores[i * len(prompts) : (i + 1) * len(prompts)]
        rescored.append(Candidate(candidate.grid, candidate.votes, math.fsum(own) / len(own)))
    return sorted(rescored, key=lambda c: (-c.log_prob, -c.votes))


def attempts(candidates: Sequence[Candidate]) -> list[Grid]:
    """The first two candidates' grids; fewer where there are fewer."""
    return [candidate.grid for candidate in candidates[:2]]
