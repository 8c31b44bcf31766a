"""What others do to balance routes: the peers of FARS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiny_onn.routing.routers import load_balancing_loss
from tiny_onn.shaping.sites import Routes, Site, UpdateWatch


class LoadBalanceShaper:
    """The auxiliary load-balancing loss of Switch and GShard (arXiv:2101.03961, eq. 4), which
    pushes each router towards an even load. Reads logits only."""

    def loss(self, routes: Routes) -> Tensor:
        """The mean over sites; K when the load is even, up to E when it has collapsed."""
        terms = [
            load_balancing_loss([logits_NE], site.num_experts_per_tok)
            for site, logits_NE in zip(routes.sites, routes.logits, strict=True)
        ]
        return torch.stack(terms).mean()


class ZLossShaper:
    """The router z-loss of ST-MoE (arXiv:2202.08906, eq. 5), ``mean logsumexp(logits)^2``, which
    keeps logits small. Reads logits only."""

    def loss(self, routes: Routes) -> Tensor:
        """The mean over sites and tokens."""
        terms = [logits_NE.logsumexp(dim=-1).square().mean() for logits_NE in routes.logits]
        return torch.stack(terms).mean()


class SelectionBiasShaper:
    """Balance without an auxiliary loss (arXiv:2408.15664): a bias on each expert's logit that
    counts in the choice of experts, not in their weights, and moves by ``rate`` after each update,
    up where an expert's load was below the mean and down where it was above.

    Reads logits and the sites' ``selection_bias``, which it writes, and which goes with the model's
    weights. Takes part in no gradient: its loss is 0. Only for experts of ours.

    Args:
        rate: how far a bias moves in one update.
    """

    def __init__(self, rate: float = 0.001) -> None:
        self.rate = rate
        self._loads: dict[Site, Tensor] = {}
        self._watch = UpdateWatch(self._move)

    def attach(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Give the sites their bias, where they have none.

        Raises:
            ValueError: for experts that aren't ours.
        """
        for site in sites:
            if site.block is None:
                raise ValueError(f"bias moves TinyOnn's own choice of experts. Got {site.name}")
            if site.block.selection_bias is None:
                device = next(site.experts.parameters()).device
                site.block.selection_bias = torch.zeros(site.num_experts, device=device)
        # So that the saved model asks for its bias when it is loaded.
        config: Any = getattr(model, "config", None)
        if hasattr(config, "router_selection_bias"):
            config.router_selection_bias = True

    def loss(self, routes: Routes) -> Tensor:
        """Zero, having counted the load."""
        self._watch.watch(routes.optimizer)
        for site, logits_NE in zip(routes.sites, routes.logits, strict=True):
            assert site.block is not None
            chosen = site.block.choose(logits_NE.detach()).indices
            load_E = torch.bincount(chosen.reshape(-1), minlength=site.num_experts)
            self._loads[site] = self._loads.get(site, 0) + load_E
        return routes.logits[0].new_zeros(())

    def _move(self, updated: bool) -> None:
        loads, self._loads = self._loads, {}
        if not updated:
            return
        for site, load_E in loads.items():
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(load_E)
            below_E = torch.sign(load_E.float().mean() - load_E)
            assert site.block is not None and site.block.selection_bias is not None
            site.block.selection_bias.add_(below_E, alpha=self.rate)
