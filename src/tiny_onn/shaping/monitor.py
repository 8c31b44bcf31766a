"""What the routes look like: figures that never touch the graph.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """Means over a model's sites.

    Attributes:
        routing_entropy: mean entropy of a token's expert distribution, over log E: 1 is undecided.
        load_entropy: entropy of the load over experts, over log E: 1 is an even load.
        dead_experts: share of experts that no token chose.
        top_share: share of the routes that the busiest expert takes.
    """

    routing_entropy: float
    load_entropy: float
    dead_experts: float
    top_share: float


@torch.no_grad()
def routing_statistics(
    router_logits: Sequence[Tensor], num_experts_per_tok: int, mask: Tensor | None = None
) -> RoutingStatistics:
    """Statistics of raw router logits ``[N, E]``, one tensor a site; one host read in all.

    Args:
        mask: N entries in any shape, 0 or False for the tokens that do not count.
    """
    rows = [_site_statistics(logits, num_experts_per_tok, mask) for logits in router_logits]
    return RoutingStatistics(*torch.stack(rows).mean(0).tolist())


def _site_statistics(logits_NE: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    logits_NE = logits_NE.detach().float()
    if mask is not None:
        logits_NE = logits_NE[mask.reshape(-1).bool()]
    num_experts = logits_NE.shape[-1]
    log_experts = math.log(num_experts) or 1.0
    log_p = logits_NE.log_softmax(-1)
    chosen = logits_NE.topk(top_k, dim=-1).indices
    load_E = torch.bincount(chosen.reshape(-1), minlength=num_experts).float()
    load_E = load_E / load_E.sum()
    return torch.stack(
        [
            -(log_p.exp() * log_p).sum(-1).mean() / log_experts,
            torch.special.entr(load_E).sum() / log_experts,
            (load_E == 0).float().mean(),
            load_E.max(),
        ]
    )
