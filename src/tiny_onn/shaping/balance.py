"""The auxiliary load-balancing loss of Switch and GShard, the usual peer of FARS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.routing.routers import load_balancing_loss
from tiny_onn.shaping.sites import Site


class LoadBalanceShaper:
    """Pushes each router towards an even load (arXiv:2101.03961, eq. 4). Reads logits only."""

    def loss(self, sites: Sequence[Site], logits: Sequence[Tensor], optimizer: Optimizer) -> Tensor:
        """The mean over sites; K when the load is even, up to E when it has collapsed."""
        terms = [
            load_balancing_loss([logits_NE], site.num_experts_per_tok)
            for site, logits_NE in zip(sites, logits, strict=True)
        ]
        return torch.stack(terms).mean()
