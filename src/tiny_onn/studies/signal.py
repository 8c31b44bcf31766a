"""What FARS and SARS see of the same training: each expert's cost from step to step.

Shapes: T steps, S sites, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tiny_onn.shaping import FisherShaper, Routes, Site, SurpriseShaper

WARMUP = 10
"""First steps that don't count: the second moment has yet to form."""


class CostRecorder:
    """Notes the experts' costs by FARS and by SARS, and their load, at every step.

    It shapes nothing. Both costs are relative to their mean over a site's experts; SARS's is the
    mean over all tokens of what they send into the expert's weights, ``sars_routed`` the mean over
    those that chose it.
    """

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        self.sites = sites
        self._fisher = FisherShaper()
        self._surprise = SurpriseShaper()
        self._surprise.attach(model, sites)
        self.costs: dict[str, list[Tensor]] = {"fars": [], "sars": [], "sars_routed": []}
        self.loads: list[Tensor] = []

    def note(
        self,
        logits: Sequence[Tensor],
        optimizer: Optimizer,
        main_loss: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        """Note a forward's costs, before its backward pass; see
        :class:`~tiny_onn.shaping.Routes`."""
        routes = Routes(self.sites, logits, optimizer, kept, main_loss)
        seen = self._surprise.surprise(routes)
        chosen = [(s.cost > 0).float().mean(0) for s in seen]
        sent = [s.cost.mean(0) for s in seen]
        self.loads.append(torch.stack([c / c.mean() for c in chosen]))
        self.costs["fars"].append(torch.stack(self._fisher.costs(self.sites, optimizer)))
        self.costs["sars"].append(torch.stack([c / c.mean() for c in sent]))
        per_route = [c / n.clamp_min(1e-9) for c, n in zip(sent, chosen, strict=True)]
        self.costs["sars_routed"].append(torch.stack([c / c.mean() for c in per_route]))

    def figures(self) -> dict[str, float]:
        """``{signal}_autocorrelation``, ``{signal}_jitter`` and ``{signal}_load_correlation``."""
        figures: dict[str, float] = {}
        load_TSE = torch.stack(self.loads)[WARMUP:]
        for name, costs in self.costs.items():
            cost_TSE = torch.stack(costs)[WARMUP:]
            figures |= {
                f"{name}_autocorrelation": autocorrelation(cost_TSE.flatten(1)),
                f"{name}_jitter": jitter(cost_TSE.flatten(1)),
                f"{name}_load_correlation": correlation(cost_TSE, load_TSE),
            }
        per_load = torch.stack(self.costs["fars"])[WARMUP:] / load_TSE.clamp_min(0.01)
        return figures | {"fars_per_load_load_correlation": correlation(per_load, load_TSE)}


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of the values that are known; NaN if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def autocorrelation(series_TX: Tensor) -> float:
    """Correlation of a series with itself one step later, mean over the series that vary."""
    before, after = series_TX[:-1], series_TX[1:]
    before, after = before - before.mean(0), after - after.mean(0)
    scale = (before.square().sum(0) * after.square().sum(0)).sqrt()
    varied = scale > 0
    return float(((before * after).sum(0)[varied] / scale[varied]).mean())


def jitter(series_TX: Tensor) -> float:
    """Mean change from one step to the next, over the mean."""
    return float(series_TX.diff(dim=0).abs().mean() / series_TX.abs().mean())


def correlation(a_TSE: Tensor, b_TSE: Tensor) -> float:
    """Correlation over a site's experts, mean over steps and sites."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (a_TSE, b_TSE))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    varied = scale > 0
    return float(((a * b).sum(-1)[varied] / scale[varied]).mean())
