"""Sharpness-aware passes: the perturbation, the shear force, and when to pay for a second pass.

SAM (arXiv:2010.01412) takes the gradient at the worst point near the weights. AGA, adaptive
geometric alignment, runs that second pass only when the gradient has turned against what the last
one found; between two passes it re-uses the part of it that the plain gradient lacks, the shear
force ``s = g_adv - (<g_adv, g> / |g|²) g``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

TINY = 1e-30


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product over all tensors of two lists, a float32 scalar without a host read."""
    products = torch._foreach_mul(list(a), list(b))
    return torch.stack([x.sum(dtype=torch.float32) for x in products]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all tensors of a list, a float32 scalar without a host read."""
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(list(a))]))


class Perturbation:
    """Parameters moved by ``rho`` along some directions; :meth:`restore` puts back the very bits.

    Args:
        parameters: moved in place at construction.
        directions: of the same shapes.
        rho: length of the move.
        scope: ``"global"`` divides by the norm over all directions, ``"tensor"`` gives every
            tensor the whole radius.
    """

    def __init__(
        self, parameters: Sequence[Tensor], directions: Sequence[Tensor], rho: float, scope: str
    ) -> None:
        self.parameters = list(parameters)
        self._saved = [p.clone() for p in parameters]
        if scope == "tensor":
            norms = list(torch._foreach_norm(list(directions)))
        else:
            norms = [norm(directions)] * len(directions)
        moves = [d * (rho / (n + TINY)).to(d.dtype) for d, n in zip(directions, norms, strict=True)]
        torch._foreach_add_(self.parameters, moves)

    def restore(self) -> None:
        """Undo the move."""
        torch._foreach_copy_(self.parameters, self._saved)


def shear_force(adversarial: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """The part of the adversarial gradient that is orthogonal to the plain one."""
    along = dot(adversarial, gradient) / (dot(gradient, gradient) + TINY)
    return [a - along.to(g.dtype) * g for a, g in zip(adversarial, gradient, strict=True)]


@dataclass
class Alignment:
    """AGA's memory, and its decision.

    Attributes:
        beta: decay of ``nu``, the running mean of phi²; threshold: lambda, in units of its root.
        sync_every: a second pass comes after at most so many steps.
        nu, observed: the running mean and how many values it holds.
        since_sync: steps since the last second pass, None before the first.
        steps, syncs: counts since the beginning.
        phi: the last cosine between gradient and shear force.
    """

    beta: float = 0.9
    threshold: float = 1.0
    sync_every: int = 10
    nu: float = 0.0
    observed: int = 0
    since_sync: int | None = None
    steps: int = 0
    syncs: int = 0
    phi: float = 0.0

    @property
    def sigma(self) -> float:
        """Root of the bias-corrected mean of phi²."""
        return math.sqrt(self.nu / (1 - self.beta**self.observed)) if self.observed else 0.0

    @property
    def due(self) -> bool:
        """Whether a second pass is due whatever the geometry: the first step, or too long ago."""
        return self.since_sync is None or self.since_sync + 1 >= self.sync_every

    def observe(self, phi: float) -> bool:
        """Take in a cosine; true if the gradient has turned against the shear force."""
        self.phi = phi
        if self.since_sync != 0:
            self.nu = self.beta * self.nu + (1 - self.beta) * phi * phi
            self.observed += 1
        return bool(self.observed) and phi < -self.threshold * self.sigma

    def advance(self, synced: bool) -> None:
        """Close a step."""
        self.steps += 1
        self.syncs += synced
        self.since_sync = 0 if synced else (self.since_sync or 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)
