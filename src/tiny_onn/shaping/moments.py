"""What an optimizer remembers of the experts' gradients, read and never written.

Shapes: S sites, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.shaping.sites import Site

ADJACENT = 8
"""Entries that are read side by side: memory comes in lines, of which single entries waste most."""


def second_moments(
    site: Site, optimizer: Optimizer, *, updated: bool = False
) -> list[Tensor] | None:
    """``exp_avg_sq`` of the site's experts, or None before the optimizer's first update.

    Args:
        updated: whether the optimizer is known to have been stepped; SGD's state doesn't tell.

    Raises:
        ValueError: naming the parameter whose second moment is missing after that, or kept in
            another form than plain numbers.
    """
    state = optimizer.state
    kind = type(optimizer).__name__
    parameters = site.parameters
    if not any("exp_avg_sq" in kept for kept in state.values()):
        if any("state2" in kept for kept in state.values()):
            raise ValueError(f"{kind} keeps its second moments in 8 bits, which can't be read here")
        if updated or any(kept.get("step", 0) for kept in state.values()):
            raise ValueError(
                f"{kind} keeps no second moment (exp_avg_sq). "
                "Shaping by cost needs an optimizer of the Adam family"
            )
        return None
    for name, parameter in parameters.items():
        kept: dict[str, Any] = state.get(parameter, {})
        if "exp_avg_sq" not in kept:
            raise ValueError(f"{kind} holds no second moment of {name}")
        v = kept["exp_avg_sq"]
        if type(v) is not Tensor and not _is_sharded(v):
            form = type(v).__name__
            raise ValueError(f"{kind} keeps the second moment of {name} as {form}, not in numbers")
    return [state[parameter]["exp_avg_sq"] for parameter in parameters.values()]


class MeanRoots:
    """The mean of ``sqrt(v)`` over each expert's entries, of moments read again and again.

    Args:
        samples: about how many entries of each expert are read, eight and eight at equal distances
            over all of its parameters alike; None for all.
    """

    def __init__(self, samples: int | None = None) -> None:
        self.samples = samples
        self._known: list[Tensor] = []
        self._forms: list[tuple[list[int], list[Tensor]]] = []

    @torch.no_grad()
    def __call__(self, moments: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Float32 ``[E]`` a site, from ``v`` of the expert parameters ``[E, ...]`` of each."""
        if _is_sharded(moments[0][0]):
            return [_sharded_mean_root(site) for site in moments]
        given = [v for site in moments for v in site]
        if len(given) != len(self._known) or any(map(is_not, given, self._known)):
            self._known, self._forms = given, self._views(moments)
        found: dict[int, Tensor] = {}
        for sites, views in self._forms:
            roots = torch.cat(views, dim=1).float().sqrt_()
            means_ES = roots.view(len(roots), len(sites), -1).mean(-1)
            found |= zip(sites, means_ES.unbind(1), strict=True)
        return [found[i] for i in range(len(moments))]

    def _views(self, moments: Sequence[Sequence[Tensor]]) -> list[tuple[list[int], list[Tensor]]]:
        """Sites of the same form, which are read in one go, and the entries ``[E, n, m]`` to read
        of them: views, which see what the optimizer makes of its moments."""
        forms: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}
        for i, site in enumerate(moments):
            entries = _entries(site, self.samples)
            sites, views = forms.setdefault(tuple(v.shape for v in entries), ([], []))
            sites.append(i)
            views += entries
        return list(forms.values())


def _entries(moments: Sequence[Tensor], samples: int | None) -> list[Tensor]:
    """The entries to read of each parameter, ``[E, n, m]``.

    Their distance is odd: rows mostly have a power of two of entries, and an even distance would
    meet the same columns again and again.
    """
    sizes = [v[0].numel() for v in moments]
    adjacent = math.gcd(ADJACENT, *sizes)
    distance = 1 if samples is None or sum(sizes) <= samples else (sum(sizes) // samples) | 1
    return [v.flatten(1).unflatten(1, (-1, adjacent))[:, ::distance] for v in moments]


def _sharded_mean_root(moments: Sequence[Tensor]) -> Tensor:
    """Of experts in several processes each sums its own, and all are told."""
    total_E = sum(v.flatten(1).float().sqrt().sum(-1) for v in moments)
    assert isinstance(total_E, Tensor), "a site has at least one parameter"
    return total_E.full_tensor() / sum(v[0].numel() for v in moments)  # type: ignore[attr-defined]


def _is_sharded(v: Tensor) -> bool:
    """Whether this is a DTensor; asked without importing them."""
    return hasattr(v, "device_mesh")
