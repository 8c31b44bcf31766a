"""SARS, surprise-aware routing shaping: the predecessor of FARS, which measures with a backward
pass of its own what FARS reads from the optimizer's memory.

Shapes: N tokens, E experts, K chosen per token, P rows, the (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiny_onn.routing.dispatch import Dispatch
from tiny_onn.shaping.sites import Routes, Site


class Product(NamedTuple):
    """One product of rows with their experts' matrices: the norms of the rows that went in ``[P]``,
    and the rows that came out ``[P, O]``, in the graph."""

    norms_in: Tensor
    out: Tensor


class Surprise(NamedTuple):
    """What a batch does to one site's experts, ``[N, E]`` each, 0 where they weren't chosen.

    Attributes:
        importance: norm of the main loss's gradient at the expert's output.
        cost: norm of the gradient that the token sends into the expert's weights.
    """

    importance: Tensor
    cost: Tensor


class SurpriseShaper:
    """The entropy of ``softmax(logits - G)``, where the goodness ``G = a (b - s)`` carries no
    gradient.

    ``a`` is importance and ``s`` cost (see :class:`Surprise`), ``b`` the logits, each divided by
    the largest magnitude over the experts. Reads the logits, the experts' inputs and the gradient
    at their outputs, for which it runs through the graph of the main loss an extra time. Only for
    experts of ours, each called once a forward, without gradient checkpointing.
    """

    needs_main_loss = True

    def __init__(self) -> None:
        self._calls: dict[Site, tuple[Dispatch, list[Product]]] = {}

    def attach(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Have the experts show their products from now on.

        Raises:
            ValueError: for experts that aren't ours.
        """
        for site in sites:
            if site.block is None:
                raise ValueError(f"sars must see inside the experts. {site.name} aren't TinyOnn's")
            site.block.experts.observer = self._observer(site)

    def _observer(self, site: Site) -> Callable[[Dispatch], Callable[[Tensor, Tensor], None]]:
        def observe(rows: Dispatch) -> Callable[[Tensor, Tensor], None]:
            products: list[Product] = []
            self._calls.pop(site, None)

            def see(x_PD: Tensor, y_PO: Tensor) -> None:
                if y_PO.requires_grad:
                    products.append(Product(_norms(x_PD.detach()), y_PO))
                    self._calls[site] = (rows, products)

            return see

        return observe

    def loss(self, routes: Routes) -> Tensor:
        """The mean of the term over sites and tokens.

        Raises:
            ValueError: without the main loss, or if the experts of a site weren't computed once.
        """
        terms = []
        for logits_NE, seen in zip(routes.logits, self.surprise(routes), strict=True):
            belief = logits_NE.detach().float()
            goodness = _scaled(seen.importance) * (_scaled(belief) - _scaled(seen.cost))
            log_p = (logits_NE.float() - goodness).log_softmax(dim=-1)
            terms.append(-(log_p.exp() * log_p).sum(-1).mean())
        return torch.stack(terms).mean()

    def surprise(self, routes: Routes) -> list[Surprise]:
        """Importance and cost of every site's experts for each token; the graph stays."""
        if routes.main_loss is None:
            raise ValueError("sars takes gradients of the main loss: give calculate_meta_loss one")
        calls, self._calls = self._calls, {}
        missing = [site.name for site in routes.sites if site not in calls]
        if missing or len(routes.sites) != len(calls):
            raise ValueError(
                "sars needs a forward with gradients, once through each site, without gradient "
                f"checkpointing. Missing: {', '.join(missing) or 'none, some came twice'}"
            )
        outs = [product.out for site in routes.sites for product in calls[site][1]]
        grads = iter(torch.autograd.grad(routes.main_loss, outs, retain_graph=True))
        found = []
        for site, logits_NE in zip(routes.sites, routes.logits, strict=True):
            rows, products = calls[site]
            grad_norms = [_norms(next(grads)) for _ in products]
            squares = [(p.norms_in * g).square() for p, g in zip(products, grad_norms, strict=True)]
            cost_P = torch.stack(squares).sum(0).sqrt()
            found.append(_by_expert(site, logits_NE, rows, grad_norms[-1], cost_P, routes.kept))
        return found


def _by_expert(
    site: Site,
    logits_NE: Tensor,
    rows: Dispatch,
    grad_norm_P: Tensor,
    cost_P: Tensor,
    kept: Tensor | None,
) -> Surprise:
    """Norms of sorted rows ``[P]`` at their token and expert."""
    assert site.block is not None
    slot_NK = rows.slot if kept is None else rows.slot.index_select(0, kept)
    logits_NE = logits_NE.detach().float()
    routing = site.block.choose(logits_NE)
    # Experts mix their outputs by weights that go in before the last product.
    importance_NK = grad_norm_P[slot_NK] * routing.weights
    zeros = torch.zeros_like(logits_NE)
    return Surprise(
        zeros.scatter(1, routing.indices, importance_NK),
        zeros.scatter(1, routing.indices, cost_P[slot_NK]),
    )


def _norms(rows_PD: Tensor) -> Tensor:
    wide = torch.promote_types(rows_PD.dtype, torch.float32)
    return torch.linalg.vector_norm(rows_PD, dim=-1, dtype=wide).float()


def _scaled(values_NE: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).tiny
    return values_NE / values_NE.abs().amax(-1, keepdim=True).clamp_min(least)
