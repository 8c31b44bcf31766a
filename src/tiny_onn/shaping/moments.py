"""What an optimizer remembers of the experts' gradients, read and never written.

Shapes: S sites, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.shaping.sites import Site


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


@torch.no_grad()
def mean_roots(moments: Sequence[Sequence[Tensor]], samples: int | None) -> list[Tensor]:
    """The mean of ``sqrt(v)`` over each expert's entries, float32 ``[E]`` a site.

    Args:
        moments: ``v`` of the expert parameters ``[E, ...]`` of each site.
        samples: about how many entries of each expert are read, at equal distances over all of its
            parameters alike; None for all.
    """
    read = [_entries(site, samples) for site in moments]
    shapes = [[tuple(v.shape) for v in site] for site in read]
    if not read or any(shape != shapes[0] for shape in shapes) or _is_sharded(read[0][0]):
        return [_mean_root(site) for site in read]
    # Sites of the same form are read in one go.
    entries = torch.cat([v for site in read for v in site], dim=1).float()
    means_ES = entries.sqrt_().unflatten(1, (len(read), -1)).mean(-1)
    return list(means_ES.unbind(1))


def _entries(moments: Sequence[Tensor], samples: int | None) -> list[Tensor]:
    """The entries to read of each parameter, ``[E, n]``.

    Their distance is odd: rows mostly have a power of two of entries, and an even distance would
    meet the same columns again and again.
    """
    most = sum(v[0].numel() for v in moments)
    if samples is None or most <= samples or _is_sharded(moments[0]):
        return [v.flatten(1) for v in moments]
    return [v.flatten(1)[:, :: (most // samples) | 1] for v in moments]


def _mean_root(entries: Sequence[Tensor]) -> Tensor:
    total_E = sum(v.float().sqrt().sum(-1) for v in entries)
    assert isinstance(total_E, Tensor), "a site has at least one parameter"
    # Experts in several processes: each sums its own, and all are told.
    if _is_sharded(total_E):
        total_E = total_E.full_tensor()  # type: ignore[attr-defined]
    return total_E / sum(v.shape[1] for v in entries)


def _is_sharded(v: Tensor) -> bool:
    """Whether this is a DTensor; asked without importing them."""
    return hasattr(v, "device_mesh")
