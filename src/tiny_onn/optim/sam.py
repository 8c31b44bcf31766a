"""Sharpness-aware passes: the perturbation, the shear force, and when to pay for a second pass.

SAM (arXiv:2010.01412) takes the gradient at the worst point near the weights. AGA, adaptive
geometric alignment, runs that second pass only when the gradient has turned against what the last
one found; between two passes it re-uses the part of it that the plain gradient lacks, the shear
force ``s = g_adv - (<g_adv, g> / |g|²) g``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_onn.optim.sharding import Total, here, local

TINY = 1e-30


def dot(a: Sequence[Tensor], b: Sequence[Tensor], total: Total = here) -> Tensor:
    """The inner product over all tensors of two lists, a float32 scalar without a host read."""
    products = torch._foreach_mul(list(a), list(b))
    return total(torch.stack([x.sum(dtype=torch.float32) for x in products])).sum()


def norms(a: Sequence[Tensor], total: Total = here) -> Tensor:
    """The Euclidean norm of each tensor of a list, float32 ``[P]``."""
    found = torch.stack([n.float() for n in torch._foreach_norm(list(a))])
    return found if total is here else total(found.square()).sqrt()


def norm(a: Sequence[Tensor], total: Total = here) -> Tensor:
    """The Euclidean norm over all tensors of a list, a float32 scalar without a host read."""
    return torch.linalg.vector_norm(norms(a, total))


def cosine(a: Sequence[Tensor], b: Sequence[Tensor], total: Total = here) -> Tensor:
    """The cosine of the angle between two lists of tensors, 0 where one of them is zero."""
    return dot(a, b, total) / (norm(a, total) * norm(b, total) + TINY)


def sharpest_directions(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: Sequence[int],
    beta2s: Sequence[float],
    epss: Sequence[float],
) -> list[Tensor]:
    """``|w| g / (sqrt(v') + eps)`` with the second moment as it would be after this step.

    Args:
        ages: updates of each parameter, this one included.
        beta2s, epss: settings of each parameter.
    """
    squares = torch._foreach_mul(gradients, gradients)
    roots = torch._foreach_lerp(exp_avg_sqs, squares, [1 - beta2 for beta2 in beta2s])
    torch._foreach_div_(roots, [1 - b**age for b, age in zip(beta2s, ages, strict=True)])
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, list(epss))
    directions = torch._foreach_mul(torch._foreach_abs(parameters), gradients)
    torch._foreach_div_(directions, roots)
    return list(directions)


class Perturbation:
    """Parameters moved by ``rho`` along some directions; :meth:`restore` puts back the very bits.

    Directions that are not finite move nothing.

    Args:
        parameters: moved in place at construction.
        directions: of the same shapes; overwritten.
        rho: length of the move.
        scope: ``"global"`` divides by the norm over all directions, ``"tensor"`` gives every
            tensor the whole radius.
        total: adds up over processes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        directions: list[Tensor],
        rho: float,
        scope: str,
        total: Total = here,
    ) -> None:
        self.parameters = list(parameters)
        self._saved = [p.clone() for p in parameters]
        lengths = norms(directions, total)
        if scope == "global":
            lengths = torch.linalg.vector_norm(lengths).expand_as(lengths)
        for move, length in zip(directions, lengths.unbind(), strict=True):
            move.mul_((rho / (length + TINY)).to(move.dtype)).nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_add_(self.parameters, directions)

    def restore(self) -> None:
        """Undo the move."""
        torch._foreach_copy_(self.parameters, self._saved)


def shear_force(
    adversarial: Sequence[Tensor], gradient: Sequence[Tensor], total: Total = here
) -> list[Tensor]:
    """The part of the adversarial gradient that is orthogonal to the plain one."""
    along = dot(adversarial, gradient, total) / (dot(gradient, gradient, total) + TINY)
    return [a - along.to(g.dtype) * g for a, g in zip(adversarial, gradient, strict=True)]


def add_shear(
    gradients: Sequence[Tensor], shear: Sequence[Tensor], weight: float, total: Total = here
) -> None:
    """``g <- g + weight (|g| / |s|) s``, in place."""
    scale = weight * norm(gradients, total) / (norm(shear, total) + TINY)
    for g, s in zip(gradients, shear, strict=True):
        g.add_(s * scale.to(s.dtype))


@dataclass
class FirstPass:
    """A step between its passes.

    Attributes:
        parameters: those that the first pass reached.
        gradients: its gradients, copies of the parts in this process.
        move: where the parameters were moved to for the second pass.
        total: adds up over processes.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    move: Perturbation
    total: Total

    @property
    def is_finite(self) -> Tensor:
        """Whether the first pass's gradients were, a boolean scalar."""
        return torch.isfinite(norm(self.gradients, self.total))

    def settle(self, shear: list[Tensor] | None) -> None:
        """After the second pass: give every parameter the gradient its update uses.

        A parameter that only one pass reached keeps the gradient of that pass, and a second pass
        that is not finite anywhere counts for nothing.

        Args:
            shear: overwritten by the shear force, where it is kept.
        """
        for p, g in zip(self.parameters, self.gradients, strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
                local(p.grad).copy_(g)
        adversarial = [local(p.grad) for p in self.parameters]
        finite = torch.isfinite(norm(adversarial, self.total))
        for a, g in zip(adversarial, self.gradients, strict=True):
            torch.where(finite, a, g, out=a)
        if shear is not None:
            torch._foreach_copy_(shear, shear_force(adversarial, self.gradients, self.total))


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
        if not math.isfinite(phi):
            return False
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
        """What it remembers, without its settings: plain numbers."""
        return {name: getattr(self, name) for name in _MEMORY}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what another one remembered."""
        for name in state.keys() & set(_MEMORY):
            setattr(self, name, state[name])


_MEMORY = ("nu", "observed", "since_sync", "steps", "syncs", "phi")
