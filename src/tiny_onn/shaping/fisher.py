"""FARS, Fisher-aware routing shaping: routes are priced by the optimizer's second moment.

Shapes: N tokens, E experts.

An Adam-like optimizer keeps ``v``, a running mean of each weight's squared gradient: the diagonal
of an empirical Fisher information. An expert whose ``v`` is large is being rewritten; sending it
more tokens costs more of what it knows. FARS charges each token for the experts it leans on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.shaping.sites import Site


def fisher_cost(second_moments: Iterable[Tensor]) -> Tensor:
    """Each expert's learning cost, relative to the mean over the experts.

    ``c_e = mean over the expert's entries of sqrt(v)``, returned as ``c_e / mean_e c_e``, float32
    ``[E]``; all ones where nothing has been learnt yet. A common factor of ``v``, such as Adam's
    bias correction, cancels.

    Args:
        second_moments: ``v`` of each of the site's expert parameters, ``[E, ...]``.
    """
    moments = list(second_moments)
    total_E = sum(v.detach().float().sqrt().flatten(1).sum(-1) for v in moments)
    assert isinstance(total_E, Tensor), "a site has at least one parameter"
    cost_E = total_E / sum(v[0].numel() for v in moments)
    mean = cost_E.mean()
    return torch.where(mean > 0, cost_E / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


class FisherShaper:
    """The FARS term: ``w_entropy * H(p) + cost_alpha * sum_e p_e c_e``, mean over tokens.

    Reads the router logits and the optimizer's ``exp_avg_sq`` of the experts. The costs are
    computed once per optimizer update and reused by every forward until the next.

    Args:
        w_entropy: weight of the routing entropy ``H(p)``, in nats.
        cost_alpha: weight of the expected cost.
    """

    def __init__(self, w_entropy: float = 1.0, cost_alpha: float = 0.1) -> None:
        self.w_entropy = w_entropy
        self.cost_alpha = cost_alpha
        self._costs: list[Tensor] | None = None
        self._watched: Optimizer | None = None
        self._updated = False

    def loss(self, sites: Sequence[Site], logits: Sequence[Tensor], optimizer: Optimizer) -> Tensor:
        """The mean of the term over sites; a scalar whose gradient reaches the routers.

        Args:
            sites: the S routed sites.
            logits: raw router logits ``[N, E]`` of each site, padding tokens left out.
            optimizer: an optimizer of the Adam family that holds the experts' parameters.
        """
        terms = [
            self._term(logits_NE, cost_E)
            for logits_NE, cost_E in zip(logits, self.costs(sites, optimizer), strict=True)
        ]
        return torch.stack(terms).mean()

    def _term(self, logits_NE: Tensor, cost_E: Tensor) -> Tensor:
        log_p = logits_NE.log_softmax(dim=-1)
        price_NE = self.cost_alpha * cost_E - self.w_entropy * log_p
        return (log_p.exp() * price_NE).sum(-1).mean()

    def costs(self, sites: Sequence[Site], optimizer: Optimizer) -> list[Tensor]:
        """The relative cost ``[E]`` of every site's experts, one tensor a site.

        Raises:
            ValueError: naming the parameter, if the optimizer has been stepped and holds no
                second moment of it.
        """
        if self._watched is not optimizer:
            self._watch(optimizer)
        if self._costs is None:
            self._costs = [self._site_cost(site, optimizer) for site in sites]
        return self._costs

    def _watch(self, optimizer: Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self._forget(updated=True))
        optimizer.register_load_state_dict_post_hook(lambda *_: self._forget(updated=False))
        self._watched = optimizer
        self._forget(updated=False)

    def _forget(self, updated: bool) -> None:
        self._costs = None
        self._updated = updated

    def _site_cost(self, site: Site, optimizer: Optimizer) -> Tensor:
        moments = second_moments(site, optimizer, updated=self._updated)
        if moments is not None:
            return fisher_cost(moments)
        device = next(iter(site.parameters.values())).device
        return torch.ones(site.num_experts, device=device)


def second_moments(
    site: Site, optimizer: Optimizer, *, updated: bool = False
) -> list[Tensor] | None:
    """``exp_avg_sq`` of the site's experts, or None before the optimizer's first update.

    Args:
        updated: whether the optimizer is known to have been stepped; SGD's state doesn't tell.

    Raises:
        ValueError: naming the parameter whose second moment is missing after that.
    """
    state = optimizer.state
    if not any("exp_avg_sq" in kept for kept in state.values()):
        if updated or any(kept.get("step", 0) for kept in state.values()):
            raise ValueError(
                f"{type(optimizer).__name__} keeps no second moment (exp_avg_sq). "
                "Shaping by cost needs an optimizer of the Adam family"
            )
        return None
    for name, parameter in site.parameters.items():
        if "exp_avg_sq" not in state.get(parameter, {}):
            raise ValueError(f"{type(optimizer).__name__} holds no second moment of {name}")
    return [state[parameter]["exp_avg_sq"] for parameter in site.parameters.values()]
