"""The shaper of a model's routes: what a training step adds to its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.shaping.balance import LoadBalanceShaper, SelectionBiasShaper, ZLossShaper
from tiny_onn.shaping.fisher import FisherShaper
from tiny_onn.shaping.sites import Routes, Site, find_sites
from tiny_onn.shaping.surprise import SurpriseShaper


class Strategy(Protocol):
    """One way of shaping: a scalar loss from a batch's routes. What it remembers from one update to
    the next it may offer as ``state_dict`` and ``load_state_dict``; what it has to do to the sites
    beforehand, in
    ``attach(model, sites)``."""

    def loss(self, routes: Routes) -> Tensor: ...


SHAPERS: dict[str, Callable[..., Strategy] | None] = {
    "none": None,
    "balance": LoadBalanceShaper,
    "bias": SelectionBiasShaper,
    "z": ZLossShaper,
    "sars": SurpriseShaper,
    "fars": FisherShaper,
}
"""The strategies by name; "none" leaves the routes to the main loss."""


class RoutingShaper:
    """Computes the routing loss of a model's sites.

    Args:
        model: a model with :class:`~tiny_onn.routing.MixtureOfExperts` modules.
        strategy: a name in ``SHAPERS``, several of them as in ``"fars+z"``, or a strategy object of
            your own. Several are added up; ``weights`` says how.
        w_meta: weight of the whole term.
        sites: the sites of a model of another kind (see :func:`~tiny_onn.shaping.shape_routing`).
        weights: of each strategy named, 1 where nothing is said.
        options: of the strategies named, e.g. ``w_entropy`` and ``cost_alpha`` of FARS.

    Raises:
        ValueError: for a strategy or an option that doesn't exist.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str | Strategy = "fars",
        w_meta: float = 0.1,
        *,
        sites: Sequence[Site] | None = None,
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.sites = find_sites(model) if sites is None else list(sites)
        self.w_meta = w_meta
        self.strategies = _strategies(strategy, options)
        self.weights = dict(weights or {})
        unknown = self.weights.keys() - self.strategies.keys()
        if unknown:
            raise ValueError(
                f"weights must be of the strategies {', '.join(self.strategies)}. "
                f"Got {', '.join(sorted(unknown))}"
            )
        for each in self.strategies.values():
            if hasattr(each, "attach"):
                each.attach(model, self.sites)

    @property
    def needs_main_loss(self) -> bool:
        """Whether a strategy needs the main loss now. Where none does, take the routing loss before
        the main one: gradients are computed in the reverse order, and those of the logits then come
        after the widest of the main loss's, which lowers the peak of memory."""
        return any(getattr(s, "needs_main_loss", False) for s in self.strategies.values())

    def calculate_meta_loss(
        self,
        routing: Sequence[Tensor],
        optimizer: Optimizer,
        mask: Tensor | None = None,
        main_loss: Tensor | None = None,
    ) -> Tensor:
        """``w_meta`` times the mean of the strategies' terms over sites and tokens, a scalar.

        Call it inside the closure, so that both passes of a sharpness-aware step see it.

        Args:
            routing: raw router logits ``[N, E]`` of every site, in the sites' order; with
                recurrences, of all sites once, then once again, and so on.
            optimizer: read only, for the strategies that price experts by its second moment.
            mask: N entries in any shape, 0 or False for the tokens that do not count (padding);
                a batch of nothing else gives 0.
            main_loss: what this is added to; "sars" and ``cost_alpha="auto"`` need it.

        Raises:
            ValueError: if the number of sites or of the mask's entries differs, or if the main loss
                is needed and missing.
        """
        rounds, rest = divmod(len(routing), len(self.sites))
        if rest or not rounds:
            raise ValueError(f"Expected the logits of {len(self.sites)} sites. Got {len(routing)}")
        nothing = routing[0].new_zeros(())
        if not self.strategies:
            return nothing
        kept = None if mask is None else _places(routing, mask)
        if not len(routing[0] if kept is None else kept):
            return nothing
        routes = Routes(self.sites * rounds, routing, optimizer, kept, main_loss, self.w_meta)
        terms = [
            self.weights.get(name, 1.0) * strategy.loss(routes)
            for name, strategy in self.strategies.items()
        ]
        return self.w_meta * sum(terms, nothing)

    @property
    def diagnostics(self) -> dict[str, float]:
        """What the strategies have to say of themselves at this moment, for a log."""
        found: dict[str, float] = {}
        for strategy in self.strategies.values():
            found |= getattr(strategy, "diagnostics", {})
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the strategies remember from one update to the next, numbers only."""
        states = {
            name: strategy.state_dict()
            for name, strategy in self.strategies.items()
            if hasattr(strategy, "state_dict")
        }
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, kept in state.items():
            self.strategies[name].load_state_dict(kept)  # type: ignore[attr-defined]


def _places(routing: Sequence[Tensor], mask: Tensor) -> Tensor | None:
    """The places of the tokens that count, None for all."""
    if mask.numel() != len(routing[0]):
        raise ValueError(
            f"mask must have {len(routing[0])} entries, one a token. Got {mask.numel()}"
        )
    return None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(-1)


def _strategies(strategy: str | Strategy, options: dict[str, Any]) -> dict[str, Strategy]:
    if not isinstance(strategy, str):
        return {type(strategy).__name__: strategy}
    made: dict[str, Strategy] = {}
    unused = set(options)
    for name in strategy.split("+"):
        if name not in SHAPERS:
            raise ValueError(f"strategy must be one of {', '.join(SHAPERS)}. Got {name!r}")
        make = SHAPERS[name]
        if make is not None:
            own = options.keys() & inspect.signature(make).parameters.keys()
            made[name] = make(**{key: options[key] for key in own})
            unused -= own
    if unused:
        raise ValueError(f"The strategy {strategy} has no option {', '.join(sorted(unused))}")
    return made
