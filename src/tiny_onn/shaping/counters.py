"""Sums over the tokens that a monitor has seen, and what is needed to add to them.

Shapes: S sites, N tokens, E experts, G groups (tasks), P parts of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

_VIEW_BITS = 32


@dataclass
class Counters:
    """Sums over the tokens that counted. Row G of the groups is for tokens without one.

    Attributes:
        routes: chosen routes, int64 ``[S, G + 1, E]``.
        tokens: their number, ``[]``; entropy: sum of their routes' entropies, nats, ``[S]``.
        group_routes: sum of their probabilities ``[S, G + 1, E]``; group_tokens: ``[G + 1]``.
        distances: sum of the distances of parts to their groups ``[S]``; parts: number ``[]``.
    """

    routes: Tensor
    tokens: Tensor
    entropy: Tensor
    group_routes: Tensor
    group_tokens: Tensor
    distances: Tensor
    parts: Tensor

    @classmethod
    def zeros(cls, sites: int, groups: int, experts: int, device: torch.device) -> Counters:
        wide = torch.float32 if device.type == "mps" else torch.float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=wide, device=device)

        by_group = (sites, groups + 1, experts)
        routes = torch.zeros(by_group, dtype=torch.int64, device=device)
        return cls(
            routes,
            zeros(),
            zeros(sites),
            zeros(*by_group),
            zeros(groups + 1),
            zeros(sites),
            zeros(),
        )

    def __add__(self, other: Counters) -> Counters:
        names = [field.name for field in fields(self)]
        return Counters(*(getattr(self, name) + getattr(other, name) for name in names))

    def to(self, device: torch.device) -> Counters:
        return Counters(*(tensor.to(device) for tensor in vars(self).values()))


def flat(entries: Tensor, tokens: int, name: str) -> Tensor:
    if entries.numel() != tokens:
        raise ValueError(f"{name} must have {tokens} entries, one a token. Got {entries.numel()}")
    return entries.detach().reshape(-1)


def kept_tokens(mask: Tensor | None, figures_SN: Tensor) -> Tensor:
    """Which tokens count, bool ``[N]``: those of the mask that have a finite figure everywhere."""
    kept_N = figures_SN.isfinite().all(0)
    if mask is None:
        return kept_N
    return kept_N & flat(mask, len(kept_N), "mask").to(kept_N.device).bool()


def biased(logits_SNE: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    if len(biases) != len(logits_SNE):
        raise ValueError(f"Expected the biases of {len(logits_SNE)} sites. Got {len(biases)}")
    rows = zip(logits_SNE, biases, strict=True)
    width = logits_SNE.shape[-1]
    return torch.stack(
        [x if b is None else x + F.pad(b.detach(), (0, width - len(b))) for x, b in rows]
    )


def number_parts(group_N: Tensor, view_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Number the (group, view) pairs: each token's ``[N]``, and the group of each ``[P]``."""
    view_N = view_N.to(group_N.device).long() & ((1 << _VIEW_BITS) - 1)
    key_N, order_N = ((group_N << _VIEW_BITS) + view_N).sort()
    number_N = (key_N.diff(prepend=key_N[:1]) != 0).cumsum(0)
    # How many there are is known to the host only where the host counted them.
    known = number_N.device.type == "cpu" and len(number_N)
    parts = int(number_N[-1]) + 1 if known else len(number_N)
    group_P = torch.full((parts,), num_groups, device=group_N.device)
    group_P.scatter_(0, number_N, key_N >> _VIEW_BITS)
    return torch.empty_like(number_N).scatter_(0, order_N, number_N), group_P


def shares(routes: Tensor) -> Tensor:
    return (routes / routes.sum(-1, keepdim=True).clamp_min(1)).float()
