"""What the routes look like: figures that never touch the graph.

Shapes: S sites, N tokens, E experts, K chosen per token, G groups (tasks), P parts of groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.shaping.counters import Counters, biased, flat, kept_tokens, number_parts, shares
from tiny_onn.shaping.information import jensen_shannon_distance, mutual_information

# Far below the logarithm of the smallest float32, so that its exponential is 0 and finite times it.
_LOG_NOTHING = -1e4


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


def routing_statistics(
    router_logits: Sequence[Tensor],
    num_experts_per_tok: int | Sequence[int],
    mask: Tensor | None = None,
) -> RoutingStatistics:
    """Statistics of one batch's raw router logits ``[N, E]``, one tensor a site; one host read in
    all. :class:`RoutingMonitor` gives more, over many batches.

    Args:
        num_experts_per_tok: K, or one of each site.
        mask: N entries in any shape, 0 or False for the tokens that do not count.
    """
    monitor = RoutingMonitor(num_experts_per_tok)
    monitor.update(router_logits, mask)
    found = monitor.summary()
    return RoutingStatistics(*(found.get(name, math.nan) for name in RoutingStatistics._fields))


class RoutingMonitor:
    """Counts a model's routes while it runs, batch by batch, and sums them up in a few figures::

        monitor = RoutingMonitor(config.num_experts_per_tok, num_groups=len(tasks))
        ...
        if step % monitor.interval == 0:
            monitor.update(outputs.router_logits, mask, groups=batch.task_ids)
            log(monitor.summary())

    It stores sums, not tokens: its memory is ``S (G + 1) E`` numbers, four times over, and the last
    probe's routes, however long it runs. Nothing it keeps is part of the autograd graph, and
    :meth:`update` and :meth:`probe` read nothing back from an accelerator. A token whose logits
    aren't finite numbers at a site (but for -inf, an expert that can't be chosen) doesn't count.
    The figures are of this process alone.

    Args:
        num_experts_per_tok: K, or one of each site.
        num_groups: G, how many groups of tokens (tasks) there are; 0 where that isn't known.
        window: the figures cover the last ``window`` to twice ``window`` updates; 0: all of them
            since the last :meth:`reset`.

    Attributes:
        interval: steps between two updates that keep the cost far under 1 % of a training step.

    Raises:
        ValueError: for a number below its bound.
    """

    interval = 10

    def __init__(
        self, num_experts_per_tok: int | Sequence[int], num_groups: int = 0, *, window: int = 0
    ) -> None:
        chosen = (
            num_experts_per_tok if isinstance(num_experts_per_tok, int) else [*num_experts_per_tok]
        )
        least = chosen if isinstance(chosen, int) else min(chosen, default=0)
        for name, value, bound in (
            ("num_experts_per_tok", least, 1),
            ("num_groups", num_groups, 0),
            ("window", window, 0),
        ):
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}. Got {value}")
        self.num_experts_per_tok = chosen
        self.num_groups = num_groups
        self.window = window
        self._experts: list[int] = []
        self._now: Counters | None = None
        self._before: Counters | None = None
        self._updates = 0
        self._probe: Tensor | None = None
        self._jitter: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        router_logits: Sequence[Tensor],
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        views: Tensor | None = None,
        *,
        biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Count one batch.

        Args:
            router_logits: raw logits ``[N, E]``, one tensor a site, of any float dtype.
            mask: N entries in any shape, 0 or False for the tokens that don't count (padding).
            groups: the group of each token, integers of N entries in any shape; negative: none.
            views: the view, or the pair, of its group that each token is part of: any integers of
                N entries; only with ``groups``.
            biases: what is added to each site's logits for the choice of experts ``[E]``, or None.

        Raises:
            ValueError: if numbers of sites, experts or tokens don't fit, or a group is not in
                0..G-1 (checked where that needs no reading back: on the CPU).
        """
        logits_SNE = self._stacked(router_logits)
        S, N, E = logits_SNE.shape
        counters = self._counters(S, E, logits_SNE.device)
        log_p = logits_SNE.log_softmax(-1).clamp_min(_LOG_NOTHING)
        p_SNE = log_p.exp()
        entropy_SN = -(p_SNE * log_p).sum(-1)
        kept_N = kept_tokens(mask, entropy_SN)
        group_N = self._groups(groups, kept_N)
        counters.tokens += kept_N.sum()
        counters.entropy += entropy_SN.where(kept_N, 0.0).sum(-1)
        choice_SNE = logits_SNE if biases is None else biased(logits_SNE, biases)
        self._count_routes(counters.routes, choice_SNE, kept_N, group_N)
        if groups is not None:
            p_SNE = p_SNE.where(kept_N[:, None], 0.0)
            part_N, group_P = group_N, torch.arange(self.num_groups + 1, device=group_N.device)
            if views is not None:
                view_N = flat(views, N, "views")
                part_N, group_P = number_parts(group_N, view_N, self.num_groups)
            self._compare(counters, p_SNE, kept_N, part_N, group_P)
        elif views is not None:
            raise ValueError("views must come with groups: they are views of a group")

    @torch.no_grad()
    def probe(self, router_logits: Sequence[Tensor], mask: Tensor | None = None) -> None:
        """Look at the routes of a batch that is always the same one: how far they are from those of
        the probe before is the jitter. Keeps their probabilities, ``S N E`` numbers.

        Args:
            router_logits, mask: as for :meth:`update`, in evaluation mode.

        Raises:
            ValueError: if their shape is another one than before.
        """
        p_SNE = self._stacked(router_logits).softmax(-1)
        before, self._probe = self._probe, p_SNE
        if before is None:
            return
        if before.shape != p_SNE.shape:
            self._probe = before
            raise ValueError(
                f"probe must see the same batch every time, {tuple(before.shape)} (sites, tokens, "
                f"experts). Got {tuple(p_SNE.shape)}"
            )
        distance_SN = jensen_shannon_distance(p_SNE, before.to(p_SNE.device))
        kept_N = kept_tokens(mask, distance_SN)
        total = distance_SN.where(kept_N, 0.0).sum()
        self._jitter = total / (kept_N.sum() * len(p_SNE))

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """The figures that are known so far; one host read.

        Returns:
            Means over sites, by name:

            - ``routing_entropy``: mean entropy of a token's expert distribution, the softmax of its
              logits, over log E: 1 is undecided.
            - ``load_entropy``: entropy of the load over experts, over log E: 1 is an even load.
            - ``dead_experts``: share of the experts that no token chose.
            - ``top_share``: share of the routes that the busiest expert takes.
            - ``consistency``: how alike the routes of a group are, as the mean distance of the mean
              route of each of its parts to its own mean route (Jensen-Shannon, base 2, 0 to 1):
              0 is alike. A part is a view in one update, or where no views are given all there was
              of the group in one update; the group's mean is the one up to and with that update. A
              part that is all that was seen of its group doesn't count.
            - ``mutual_information``: of chosen expert and group, bits: what a route tells of the
              task, 0 to the smaller of log2 E and log2 G; corrected for its bias (see
              :func:`~tiny_onn.shaping.information.mutual_information`).
            - ``jitter``: mean distance (as above) of the tokens' routes in the last two probes.
        """
        found: dict[str, Tensor] = {}
        if self._now is not None:
            found = self._figures(self._total())
        if self._jitter is not None:
            found["jitter"] = self._jitter
        if not found:
            return {}
        device = next(iter(found.values())).device
        values = torch.stack([value.to(device) for value in found.values()]).tolist()
        return {k: v for k, v in zip(found, values, strict=True) if not math.isnan(v)}

    @property
    def load(self) -> Tensor:
        """Share of the routes of each expert, float32 ``[S, E]``; rows sum to 1, or are 0 if
        nothing counted. Of sites with fewer than E experts the rest is 0."""
        return shares(self._total().routes.sum(1))

    @property
    def load_by_group(self) -> Tensor:
        """Share of the routes of each expert within each group, float32 ``[S, G, E]``; rows sum to
        1, or are 0 for a group that wasn't seen."""
        return shares(self._total().routes[:, : self.num_groups])

    def reset(self) -> None:
        """Forget all figures. The last probe's routes stay, for the next one to compare with."""
        self._now = self._before = self._jitter = None
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        """All there is, as tensors, numbers and lists of them; an equal monitor goes on from it."""
        kept = {"now": self._now, "before": self._before}
        state: dict[str, Any] = {"experts": list(self._experts), "updates": self._updates}
        for prefix, counters in kept.items():
            if counters is not None:
                state |= {f"{prefix}.{k}": v.clone() for k, v in vars(counters).items()}
        for name, tensor in (("probe", self._probe), ("jitter", self._jitter)):
            if tensor is not None:
                state[name] = tensor.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, on whatever device comes next.

        Raises:
            ValueError: if it is of another number of groups.
        """
        names = [field.name for field in fields(Counters)]
        found = [
            Counters(*(state[f"{prefix}.{name}"].clone() for name in names))
            if f"{prefix}.routes" in state
            else None
            for prefix in ("now", "before")
        ]
        if found[0] is not None and found[0].routes.shape[1] != self.num_groups + 1:
            raise ValueError(
                f"The state is of {found[0].routes.shape[1] - 1} groups, expected {self.num_groups}"
            )
        self._now, self._before = found
        self._experts, self._updates = [*state["experts"]], int(state["updates"])
        self._probe, self._jitter = (
            state[name].clone() if name in state else None for name in ("probe", "jitter")
        )

    def _stacked(self, router_logits: Sequence[Tensor]) -> Tensor:
        """The logits ``[S, N, E]``, float32; where a site has fewer experts, -inf."""
        experts = [logits.shape[-1] for logits in router_logits]
        chosen = self._chosen(len(experts))
        self._experts = self._experts or experts
        if experts != self._experts or not experts:
            raise ValueError(f"Expected logits of {self._experts or 'some'} experts. Got {experts}")
        for k, num_experts in zip(chosen, experts, strict=True):
            if k > num_experts:
                raise ValueError(f"num_experts_per_tok is {k}, more than {num_experts} experts")
        if len({len(logits) for logits in router_logits}) > 1:
            raise ValueError("All sites must have routed the same tokens")
        most = max(experts)
        rows = [logits.detach().float() for logits in router_logits]
        return torch.stack(
            [F.pad(x_NE, (0, most - x_NE.shape[-1]), value=-math.inf) for x_NE in rows]
        )

    def _chosen(self, sites: int) -> list[int]:
        chosen = self.num_experts_per_tok
        if isinstance(chosen, int):
            return [chosen] * sites
        if len(chosen) != sites:
            raise ValueError(f"Expected the logits of {len(chosen)} sites. Got {sites}")
        return chosen

    def _counters(self, sites: int, experts: int, device: torch.device) -> Counters:
        """What this update adds to."""
        if self._now is not None and self.window and self._updates >= self.window:
            self._before, self._now, self._updates = self._now, None, 0
        if self._now is None:
            self._now = Counters.zeros(sites, self.num_groups, experts, device)
        if self._now.routes.device != device:
            self._now = self._now.to(device)
            self._before = self._before and self._before.to(device)
        self._updates += 1
        return self._now

    def _total(self) -> Counters:
        if self._now is None:
            raise ValueError("There are no routes yet: update the monitor first")
        return self._now if self._before is None else self._before + self._now

    def _groups(self, groups: Tensor | None, kept_N: Tensor) -> Tensor:
        """The group of each token, int64 ``[N]``, G for none."""
        none = torch.full_like(kept_N, self.num_groups, dtype=torch.int64)
        if groups is None:
            return none
        if not self.num_groups:
            raise ValueError("groups must come with num_groups: RoutingMonitor(..., num_groups=G)")
        group_N = flat(groups, len(kept_N), "groups").to(kept_N.device).long()
        group_N = group_N.where(kept_N & (group_N >= 0), -1)
        if group_N.device.type == "cpu" and len(group_N) and group_N.max() >= self.num_groups:
            raise ValueError(f"groups must be below {self.num_groups}. Got {int(group_N.max())}")
        return group_N.where(group_N >= 0, none)

    def _count_routes(
        self, routes: Tensor, choice_SNE: Tensor, kept_N: Tensor, group_N: Tensor
    ) -> None:
        S, N, E = choice_SNE.shape
        chosen = self._chosen(S)
        most = max(chosen)
        index_SNK = choice_SNE.topk(most, dim=-1, sorted=min(chosen) < most).indices
        ones_SNK = kept_N[:, None].long().expand(S, N, most)
        if min(chosen) < most:
            ranks = torch.arange(most, device=kept_N.device)
            ones_SNK = torch.stack(
                [ones.where(ranks < k, 0) for ones, k in zip(ones_SNK, chosen, strict=True)]
            )
        row_SN = torch.arange(S, device=kept_N.device)[:, None] * (self.num_groups + 1) + group_N
        place_SNK = row_SN[..., None] * E + index_SNK
        routes.view(-1).index_add_(0, place_SNK.flatten(), ones_SNK.flatten())

    def _compare(
        self,
        counters: Counters,
        p_SNE: Tensor,
        kept_N: Tensor,
        part_N: Tensor,
        group_P: Tensor,
    ) -> None:
        """Add to the groups' mean routes, and the distance of each part's to its group's."""
        S, _, E = p_SNE.shape
        sum_SPE = p_SNE.new_zeros(S, len(group_P), E).index_add_(1, part_N, p_SNE)
        tokens_P = p_SNE.new_zeros(len(group_P)).index_add_(0, part_N, kept_N.float())
        counters.group_routes.index_add_(1, group_P, sum_SPE.to(counters.entropy.dtype))
        counters.group_tokens.index_add_(0, group_P, tokens_P.to(counters.entropy.dtype))
        total = self._total()
        group_tokens_P = total.group_tokens[group_P]
        mean_SPE = (total.group_routes[:, group_P] / group_tokens_P[:, None]).float()
        distance_SP = jensen_shannon_distance(sum_SPE / tokens_P[:, None], mean_SPE)
        # A part beside which nothing of its group was seen is at 0 whatever it is.
        counts_P = (tokens_P > 0) & (tokens_P < group_tokens_P) & (group_P < self.num_groups)
        counters.distances += distance_SP.where(counts_P, 0.0).sum(-1)
        counters.parts += counts_P.sum()

    def _figures(self, total: Counters) -> dict[str, Tensor]:
        device = total.routes.device
        experts_S = torch.tensor(self._experts, device=device)
        log_experts_S = experts_S.log().where(experts_S > 1, 1.0)
        routes_SE = total.routes.sum(1)
        load_SE = routes_SE / routes_SE.sum(-1, keepdim=True)
        exists_SE = torch.arange(load_SE.shape[-1], device=device) < experts_S[:, None]
        dead_S = ((load_SE == 0) & exists_SE).sum(-1) / experts_S
        found = {
            "routing_entropy": (total.entropy / total.tokens / log_experts_S).mean(),
            "load_entropy": (torch.special.entr(load_SE).sum(-1) / log_experts_S).mean(),
            "dead_experts": dead_S.where(total.tokens > 0, math.nan).mean(),
            "top_share": load_SE.amax(-1).mean(),
        }
        if self.num_groups:
            by_group = total.routes[:, : self.num_groups]
            found["consistency"] = (total.distances / total.parts).mean()
            found["mutual_information"] = mutual_information(by_group).mean()
        return found
