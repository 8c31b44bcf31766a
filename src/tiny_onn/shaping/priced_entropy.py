"""FARS's term of a batch's logits, with a gradient that is never held for all sites at once.

Shapes: S sites, N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def priced_entropy(
    logits: Sequence[Tensor], prices: Sequence[Tensor], w_entropy: float, kept: Tensor | None = None
) -> Tensor:
    """``mean(sum_e p_e (price_e - w_entropy log p_e))`` of ``p = softmax(logits)``, over tokens and
    then over sites; a scalar.

    Its gradient of a site's logits is not computed until that of all else is there, and added to
    it: all sites' at once would be the most that a large model's backward pass ever holds.

    Args:
        logits: ``[N, E]`` of each site; prices: ``[E]`` of each.
        kept: the places of the tokens that count, None for all.
    """
    due: list[Tensor | None] = [None] * len(logits)

    def add_to(site: int) -> Callable[[Tensor], Tensor | None]:
        raw_NE, price_E = logits[site].detach(), prices[site]

        def add(grad_NE: Tensor) -> Tensor | None:
            share, due[site] = due[site], None
            if share is None:
                return None
            own = _gradient(raw_NE, price_E, w_entropy, kept).mul_(share).to(grad_NE.dtype)
            return own.add_(grad_NE) if kept is None else grad_NE.index_add(0, kept, own)

        return add

    for site, logits_NE in enumerate(logits):
        if logits_NE.requires_grad:
            logits_NE.register_hook(add_to(site))
    return _PricedEntropy.apply(due, prices, w_entropy, kept, *logits)


class _PricedEntropy(torch.autograd.Function):
    """The value of :func:`priced_entropy`; of its gradient, only what each site's is to be
    multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        due: list[Tensor | None],
        prices: Sequence[Tensor],
        w_entropy: float,
        kept: Tensor | None,
        *logits: Tensor,
    ) -> Tensor:
        ctx.due, ctx.like = due, [(x_NE.shape, x_NE.dtype) for x_NE in logits]
        ctx.tokens = len(logits[0] if kept is None else kept)
        forms: dict[int, list[int]] = {}
        for i, x_NE in enumerate(logits):
            forms.setdefault(x_NE.shape[1], []).append(i)
        terms = [
            _value([logits[i] for i in sites], [prices[i] for i in sites], w_entropy, kept)
            for sites in forms.values()
        ]
        return torch.stack(terms).sum() / (len(logits) * ctx.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.due[:] = [grad / (len(ctx.due) * ctx.tokens)] * len(ctx.due)
        zeros = [grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.like]
        return None, None, None, None, *zeros


def _value(
    logits: Sequence[Tensor], prices: Sequence[Tensor], w_entropy: float, kept: Tensor | None
) -> Tensor:
    """The sum over tokens and over sites of the same form."""
    x, experts = _stacked(logits, kept)
    if w_entropy:
        log_p = x.log_softmax(experts)
        p = log_p.exp()
    else:
        p = x.softmax(experts)
    paid = torch.dot(p.sum(3 - experts).flatten(), torch.cat(list(prices)))
    if w_entropy:
        paid -= w_entropy * torch.dot(p.flatten(), log_p.flatten())
    return paid


def _gradient(logits_NE: Tensor, price_E: Tensor, w_entropy: float, kept: Tensor | None) -> Tensor:
    """That of :func:`_value`, ``[N, E]`` of the tokens that count.

    As that of ``sum_e p_e q_e`` with q held fixed: of ``w sum_e p_e log p_e`` only p's share is
    left, and of ``log p`` the logits, as what is the same for all experts makes no difference.
    """
    x, experts = _stacked([logits_NE], kept)
    p = x.softmax(experts)
    price = price_E.unsqueeze(2 - experts)
    q = torch.sub(price, x, alpha=w_entropy) if w_entropy else price.expand_as(p)
    grad = torch._softmax_backward_data(q, p, experts, p.dtype)[0]
    return grad if experts == 2 else grad.t()


def _stacked(logits: Sequence[Tensor], kept: Tensor | None) -> tuple[Tensor, int]:
    """Logits of sites of the same form in float32, of the tokens that count, and the dimension of
    the experts: a softmax over a few numbers side by side takes a CPU several times as long as one
    across rows."""
    rows = logits if kept is None else [x_NE.index_select(0, kept) for x_NE in logits]
    few = rows[0].shape[1] < 16
    if len(rows) == 1:
        x = rows[0].t().contiguous()[None] if few else rows[0][None]
    else:
        x = torch.stack([x_NE.t() for x_NE in rows] if few else list(rows))
    return x.float(), 1 if few else 2
