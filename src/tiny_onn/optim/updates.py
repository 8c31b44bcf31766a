"""The two halves of an update as functions of plain tensors: Adam's direction, and its energy on
an orthogonal matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiny_onn.optim.sharding import Group, in_shares

Orthogonalizer = Callable[[Tensor], Tensor]


def adam_directions(
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: Sequence[int],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """``u = m̂ / (sqrt(v̂) + eps)``, after moving the moments on, in place.

    Args:
        gradients, exp_avgs, exp_avg_sqs: g, m and v of each parameter.
        ages: updates of each parameter, this one included.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    # Both bias corrections in one factor of the root: u = m / (sqrt(v) c1/c2 + eps c1).
    c1s = [1 - beta1**age for age in ages]
    ratios = [c1 / math.sqrt(1 - beta2**age) for c1, age in zip(c1s, ages, strict=True)]
    roots = torch._foreach_sqrt(exp_avg_sqs)
    if min(ages) == max(ages):
        torch._foreach_mul_(roots, ratios[0])
        torch._foreach_add_(roots, eps * c1s[0])
    else:
        torch._foreach_mul_(roots, ratios)
        torch._foreach_add_(roots, [eps * c1 for c1 in c1s])
    return list(torch._foreach_div(exp_avgs, roots))


def orthogonal_updates(
    directions: Sequence[Tensor],
    groups: Sequence[Group],
    orthogonalize: Orthogonalizer,
    update_scale: str,
    flatten: bool = False,
) -> list[Tensor]:
    """``s(u) NS(u)`` of every matrix; matrices of one shape are computed together.

    Args:
        directions: u, matrices ``[m, n]`` or stacks ``[E, m, n]``.
        groups: for each, the processes that hold the same u and share out the work.
        orthogonalize: maps a batch ``[B, m, n]`` to its orthogonal factors.
        update_scale: ``"rms"``, ``s = |u|_F / sqrt(min(m, n))``, or ``"energy"``, ``s = |u|_F``.
        flatten: take directions of any shape as matrices ``[shape[0], the rest]``.
    """
    matrices = [u.flatten(1) for u in directions] if flatten else directions
    done: dict[int, Tensor] = {}
    for turn, members in enumerate(_buckets(matrices, groups)):
        rows, columns = matrices[members[0]].shape[-2:]
        u = torch.cat([matrices[i].reshape(-1, rows, columns) for i in members])
        energy = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
        if update_scale == "rms":
            energy = energy / math.sqrt(max(1, min(rows, columns)))
        u = energy * in_shares(orthogonalize, u, groups[members[0]], turn)
        counts = [matrices[i].shape[:-2].numel() for i in members]
        for i, part in zip(members, u.split(counts), strict=True):
            done[i] = part.view(directions[i].shape)
    return [done[i] for i in range(len(directions))]


def _buckets(matrices: Sequence[Tensor], groups: Sequence[Group]) -> list[list[int]]:
    """Indices of the matrices that can be stacked: same shape, dtype, device and processes."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i, (u, group) in enumerate(zip(matrices, groups, strict=True)):
        key = (u.shape[-2:], u.dtype, u.device, None if group is None else id(group))
        found.setdefault(key, []).append(i)
    return list(found.values())


class LastUpdate:
    """Norms of an update, kept on the device until they are read."""

    def __init__(self) -> None:
        self._gradients: list[Tensor] = []
        self._steps: list[list[tuple[Tensor, int]]] = []

    def start_group(self) -> None:
        """The next notes are of the next group."""
        self._steps.append([])

    def note(self, parameters: Sequence[Tensor], gradients: Tensor, steps: Tensor) -> None:
        """Take in the norms ``[P]`` of the gradients and of the steps before their learning
        rate."""
        self._gradients.append(gradients)
        self._steps[-1].append((steps, sum(p.numel() for p in parameters)))

    def grad_norm(self) -> float:
        """Norm over all gradients."""
        return math.sqrt(sum(_squares(norms) for norms in self._gradients))

    def update_rms(self) -> list[float]:
        """Root mean square of each group's steps, over the parameters that had a gradient."""
        return [
            math.sqrt(sum(_squares(norms) for norms, _ in group) / max(1, sum(n for _, n in group)))
            for group in self._steps
        ]


def _squares(norms: Tensor) -> float:
    return float(norms.square().sum())
