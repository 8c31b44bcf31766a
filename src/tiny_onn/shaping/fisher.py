"""FARS, Fisher-aware routing shaping: routes are priced by the optimizer's second moment.

Shapes: S sites, N tokens, E experts.

An Adam-like optimizer keeps ``v``, a running mean of each weight's squared gradient: the diagonal
of an empirical Fisher information. An expert whose ``v`` is large is being rewritten; sending it
more tokens costs more of what it knows. FARS charges each token for the experts it leans on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.shaping.moments import MeanRoots, second_moments
from tiny_onn.shaping.priced_entropy import priced_entropy
from tiny_onn.shaping.sites import Routes, Site, UpdateWatch


def fisher_cost(second_moments: Iterable[Tensor], samples: int | None = None) -> Tensor:
    """Each expert's learning cost, relative to the mean over the experts.

    ``c_e = mean over the expert's entries of sqrt(v)``, returned as ``c_e / mean_e c_e``, float32
    ``[E]``; all ones where nothing has been learnt yet. A common factor of ``v``, such as Adam's
    bias correction, cancels.

    Args:
        second_moments: ``v`` of each of the site's expert parameters, ``[E, ...]``.
        samples: about how many entries of each expert are read, evenly spread; None reads all.
    """
    return _relative(MeanRoots(samples)([list(second_moments)])[0])


def _relative(cost_E: Tensor) -> Tensor:
    """Costs ``[..., E]`` over their mean."""
    mean = cost_E.mean(-1, keepdim=True)
    return torch.where(mean > 0, cost_E / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


class FisherShaper:
    """The FARS term: ``w_entropy * H(p) + cost_alpha * sum_e p_e c_e``, mean over tokens.

    Reads the router logits and the optimizer's ``exp_avg_sq`` of the experts. The costs are
    computed once per optimizer update, right after it, and reused by every forward until the next:
    by all micro-batches and by both passes of a sharpness-aware step.

    Args:
        w_entropy: weight of the routing entropy ``H(p)``, in nats.
        cost_alpha: weight of the expected cost, or ``"auto"``: so that the weighted cost is the
            given share of the main loss on average over the first updates, then frozen.
        share: that share.
        auto_updates: how many updates those are.
        samples: about how many entries of each expert's second moment are read, evenly spread; None
            reads all. 2048 give the cost to about two per cent (docs/log.md).
        per_load: divide each cost by the expert's share of the routes, a running mean over about
            100 forwards: for the study of how cost and load hang together.
    """

    def __init__(
        self,
        w_entropy: float = 1.0,
        cost_alpha: float | Literal["auto"] = 0.1,
        *,
        share: float = 0.02,
        auto_updates: int = 100,
        samples: int | None = 1024,
        per_load: bool = False,
    ) -> None:
        if isinstance(cost_alpha, str) and cost_alpha != "auto":
            raise ValueError(f'cost_alpha must be a number or "auto". Got {cost_alpha!r}')
        self.w_entropy = w_entropy
        self.share = share
        self._mean_roots = MeanRoots(samples)
        self.per_load = per_load
        self._alpha: float | Tensor = 0.0 if cost_alpha == "auto" else cost_alpha
        self._updates_left = auto_updates if cost_alpha == "auto" else 0
        self._forwards = 0
        self._loads: dict[str, Tensor] = {}
        self._costs: dict[Site, Tensor] = {}
        self._updated = False
        self._watch = UpdateWatch(self._changed)
        self._optimizer: Optimizer | None = None

    @property
    def needs_main_loss(self) -> bool:
        """Whether the weight of the cost is still being adjusted."""
        return self._updates_left > 0

    @property
    def cost_alpha(self) -> float:
        """The weight of the cost as it is now."""
        return float(self._alpha)

    @property
    def diagnostics(self) -> dict[str, float]:
        """``cost_alpha``, where it is or was adjusted."""
        return {"cost_alpha": self.cost_alpha} if self._forwards else {}

    def loss(self, routes: Routes) -> Tensor:
        """The mean of the term over sites; a scalar whose gradient reaches the routers.

        Raises:
            ValueError: if the optimizer has been stepped and holds no second moment of the experts;
                with ``cost_alpha="auto"``, without a main loss.
        """
        costs = self.costs(routes.sites, routes.optimizer)
        if self.per_load:
            costs = self._per_load(routes, costs)
        if self.needs_main_loss:
            self._adjust(routes, costs)
        prices = [self._alpha * cost_E for cost_E in costs]
        return priced_entropy(routes.routed, prices, self.w_entropy, routes.kept)

    def costs(self, sites: Sequence[Site], optimizer: Optimizer) -> list[Tensor]:
        """The relative cost ``[E]`` of every site's experts, one tensor a site.

        Raises:
            ValueError: naming the parameter, if the optimizer has been stepped and holds no
                second moment of it.
        """
        if self._watch.watch(optimizer):
            self._optimizer, self._updated, self._costs = optimizer, False, {}
        if any(site not in self._costs for site in sites):
            self._costs = dict.fromkeys(sites, torch.empty(0))
            self.refresh()
        return [self._costs[site] for site in sites]

    def _changed(self, updated: bool) -> None:
        self._updated = updated
        if updated and self._updates_left:
            self._updates_left -= 1
            if not self._updates_left:
                self._alpha = float(self._alpha)
        self.refresh()

    def refresh(self) -> None:
        """Read the costs anew, as is done after each update."""
        if self._optimizer is None:
            return
        moments = {
            site: second_moments(site, self._optimizer, updated=self._updated)
            for site in self._costs
        }
        known = {site: found for site, found in moments.items() if found is not None}
        roots = self._mean_roots(list(known.values())) if known else []
        if len({len(root_E) for root_E in roots}) == 1:
            costs = list(_relative(torch.stack(roots)).unbind())
        else:
            costs = [_relative(root_E) for root_E in roots]
        self._costs = dict(zip(known, costs, strict=True)) | {
            site: torch.ones(site.num_experts, device=next(site.experts.parameters()).device)
            for site in moments.keys() - known.keys()
        }

    @torch.no_grad()
    def _per_load(self, routes: Routes, costs: list[Tensor]) -> list[Tensor]:
        """Costs over the load relative to its mean, one again on average; a load of less than a
        hundredth of the mean counts as that."""
        found = []
        for site, logits_NE, cost_E in zip(routes.sites, routes.logits, costs, strict=True):
            chosen = logits_NE.topk(site.num_experts_per_tok, dim=-1).indices
            load_E = torch.bincount(chosen.reshape(-1), minlength=site.num_experts).float()
            load_E *= site.num_experts / load_E.sum()
            known_E = self._loads.get(site.name, load_E).to(load_E.device)
            self._loads[site.name] = load_E.lerp(known_E, 0.99)
            found.append(_relative(cost_E / self._loads[site.name].clamp_min(0.01)))
        return found

    @torch.no_grad()
    def _adjust(self, routes: Routes, costs: list[Tensor]) -> None:
        if routes.main_loss is None:
            raise ValueError(
                'cost_alpha="auto" is a share of the main loss: give calculate_meta_loss one'
            )
        priced = [
            logits_NE.float().softmax(-1).mean(0) @ cost_E
            for logits_NE, cost_E in zip(routes.logits, costs, strict=True)
        ]
        wanted = (
            self.share * routes.main_loss.detach() / (routes.w_meta * torch.stack(priced).mean())
        )
        self._forwards += 1
        self._alpha = self._alpha + (wanted - self._alpha) / self._forwards

    def state_dict(self) -> dict[str, Any]:
        """The weight of the cost, where it was adjusted, and the loads, where they count."""
        state: dict[str, Any] = {}
        if self._forwards:
            state |= {
                "cost_alpha": self.cost_alpha,
                "updates_left": self._updates_left,
                "forwards": self._forwards,
            }
        if self._loads:
            state["loads"] = {name: load_E.tolist() for name, load_E in self._loads.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        if "cost_alpha" in state:
            self._alpha = state["cost_alpha"]
            self._updates_left, self._forwards = state["updates_left"], state["forwards"]
        self._loads = {name: torch.tensor(load) for name, load in state.get("loads", {}).items()}
