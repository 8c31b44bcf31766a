"""The shaper of a model's routes: what a training step adds to its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.shaping.balance import LoadBalanceShaper
from tiny_onn.shaping.fisher import FisherShaper
from tiny_onn.shaping.sites import Site, find_sites


class Strategy(Protocol):
    """One way of shaping: a scalar loss from the sites, their logits and the optimizer."""

    def loss(
        self, sites: Sequence[Site], logits: Sequence[Tensor], optimizer: Optimizer
    ) -> Tensor: ...


SHAPERS: dict[str, Callable[..., Strategy] | None] = {
    "none": None,
    "balance": LoadBalanceShaper,
    "fars": FisherShaper,
}
"""The strategies by name; "none" leaves the routes to the main loss."""


class RoutingShaper:
    """Computes the routing loss of a model's sites.

    Args:
        model: a model with :class:`~tiny_onn.routing.MixtureOfExperts` modules.
        strategy: a name in ``SHAPERS``, or a strategy object of your own.
        w_meta: weight of the whole term.
        sites: the sites of a model of another kind (see :func:`~tiny_onn.shaping.shape_routing`).
        options: passed to the strategy named, e.g. ``w_entropy`` and ``cost_alpha`` of FARS.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str | Strategy = "fars",
        w_meta: float = 0.1,
        *,
        sites: Sequence[Site] | None = None,
        **options: float,
    ) -> None:
        self.sites = find_sites(model) if sites is None else list(sites)
        self.w_meta = w_meta
        self.strategy = _strategy(strategy, options)

    def calculate_meta_loss(
        self, routing: Sequence[Tensor], optimizer: Optimizer, mask: Tensor | None = None
    ) -> Tensor:
        """``w_meta`` times the mean of the strategy's term over sites and tokens, a scalar.

        Call it inside the closure, so that both passes of a sharpness-aware step see it.

        Args:
            routing: raw router logits ``[N, E]`` of every site, in the sites' order.
            optimizer: read only, for the strategies that price experts by its second moment.
            mask: N entries in any shape, 0 or False for the tokens that do not count (padding);
                a batch of nothing else gives 0.

        Raises:
            ValueError: if the number of sites or of the mask's entries differs.
        """
        if len(routing) != len(self.sites):
            raise ValueError(f"Expected the logits of {len(self.sites)} sites. Got {len(routing)}")
        if self.strategy is None:
            return routing[0].new_zeros(())
        kept = routing if mask is None else _without_padding(routing, mask)
        if not len(kept[0]):
            return routing[0].new_zeros(())
        return self.w_meta * self.strategy.loss(self.sites, kept, optimizer)


def _without_padding(routing: Sequence[Tensor], mask: Tensor) -> Sequence[Tensor]:
    if mask.numel() != len(routing[0]):
        raise ValueError(
            f"mask must have {len(routing[0])} entries, one a token. Got {mask.numel()}"
        )
    if bool(mask.all()):
        return routing
    flat = mask.reshape(-1).nonzero().squeeze(-1)
    return [logits_NE.index_select(0, flat) for logits_NE in routing]


def _strategy(strategy: str | Strategy, options: dict[str, float]) -> Strategy | None:
    if not isinstance(strategy, str):
        return strategy
    if strategy not in SHAPERS:
        raise ValueError(f"strategy must be one of {', '.join(SHAPERS)}. Got {strategy!r}")
    make = SHAPERS[strategy]
    return None if make is None else make(**options)
