"""Routing shaping for any mixture of experts: hooks that read the routes while a model trains.

Shapes: B batch, T tokens of a sequence, N = B*T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.shaping.expert_sites import (
    ExpertSite,
    LinearLogits,
    ReadLogits,
    find_expert_sites,
)
from tiny_onn.shaping.shaper import RoutingShaper, Strategy


def shape_routing(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    strategy: str | Strategy = "fars",
    w_meta: float = 0.1,
    *,
    sites: Sequence[ExpertSite] | None = None,
    **options: Any,
) -> ShapedRouting:
    """Read a model's routes while it trains, and give the loss that shapes them::

        shaping = shape_routing(model, optimizer)
        ...
        loss = model(**batch).loss + shaping.loss(batch["attention_mask"])

    The sites of most mixtures of experts in the transformers library are found; a model of another
    build is described by its modules, here one whose router has a temperature::

        sites = [
            ExpertSite(layer.router, layer.experts, num_experts_per_tok=2,
                       logits=lambda router, x, output: router.proj(x) / router.temperature)
            for layer in model.layers
        ]
        shaping = shape_routing(model, optimizer, sites=sites)

    ``p`` of the shaping formulas is the softmax over all experts of the raw logits. Where a model
    makes something else of its logits, ``p`` isn't its mixing weight: DeepSeek-V3 takes their
    sigmoids, adds a correction bias, and chooses within groups. As a sigmoid rises with its logit,
    ``p`` still ranks the experts as the model does before bias and groups.

    Args:
        model: the module that the training loop calls; one call is one forward.
        optimizer: read only, by the strategies that price experts by its second moment. It may be
            wrapped by accelerate, and may be given later as an attribute.
        strategy, w_meta, options: see :class:`~tiny_onn.shaping.RoutingShaper`.
        sites: by default those of :func:`find_expert_sites`; some of them will do, too.

    Raises:
        ValueError: if no site is found, or a site's experts aren't stacked.
    """
    described = find_expert_sites(model) if sites is None else list(sites)
    if not described:
        raise ValueError("sites must hold at least one ExpertSite. Got none")
    resolved = [site.resolve(model) for site in described]
    shaper = RoutingShaper(model, strategy, w_meta, sites=resolved, **options)
    return ShapedRouting(model, described, shaper, optimizer)


class ShapedRouting:
    """The hooks that read a model's routes, and the shaping loss of its last forward.

    Made by :func:`shape_routing`. Logits are kept by forwards in training mode with gradients on,
    until they are read or the next forward starts: evaluation and ``generate()`` keep nothing.
    Works under gradient checkpointing with ``use_reentrant=False``. As a context manager, it takes
    its hooks away at the end.

    Attributes:
        model: the module whose forwards are read.
        shaper: the :class:`~tiny_onn.shaping.RoutingShaper`, with the sites and the weight.
        optimizer: whose second moments are read.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        shaper: RoutingShaper,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.model = model
        self.shaper = shaper
        self.optimizer = optimizer
        self._reading = False
        self._calls: list[list[Tensor]] = [[] for _ in sites]
        # Checked before the first hook is put anywhere.
        readers = [
            described.logits or LinearLogits(described.router, site.num_experts, site.name)
            for described, site in zip(sites, shaper.sites, strict=True)
        ]
        self._handles = [
            model.register_forward_pre_hook(self._begin_hook()),
            model.register_forward_hook(self._end_hook(), always_call=True),
        ]
        for site, read, calls in zip(sites, readers, self._calls, strict=True):
            hook = self._router_hook(read, calls)
            self._handles.append(site.router.register_forward_hook(hook, with_kwargs=True))

    def logits(self) -> list[Tensor]:
        """Raw logits of the last forward, float32 ``[N, E]`` a site, with their gradient; of a
        site that was called several times, one call after the other.

        Raises:
            ValueError: if there are none, or a site has none.
        """
        if not any(self._calls):
            raise ValueError(
                "There are no router logits to read. A forward of the "
                f"{type(self.model).__name__} keeps them until the loss is taken, once, if it is "
                "in training mode, with gradients on, without re-entrant checkpointing "
                "(use_reentrant=False), and the hooks aren't removed"
            )
        for site, calls in zip(self.shaper.sites, self._calls, strict=True):
            if not calls:
                raise ValueError(
                    f"The last forward kept no logits of {site.name}. If it needn't pass there, "
                    "leave the site out: sites=[...]"
                )
        return [(torch.cat(calls) if calls[1:] else calls[0]).float() for calls in self._calls]

    def loss(self, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The shaping loss of the last forward, a scalar to add to the main loss; once a forward.

        Args:
            mask: ``[B, T]``, 0 or False for the tokens that do not count, such as the attention
                mask of a padded batch.
            options: passed to :meth:`~tiny_onn.shaping.RoutingShaper.calculate_meta_loss`.

        Raises:
            ValueError: if there are no logits to read, the mask doesn't fit them, or the strategy
                reads an optimizer and none was given.
        """
        logits, calls = self.logits(), [len(calls) for calls in self._calls]
        self._forget()
        if mask is not None:
            for site, logits_NE, times in zip(self.shaper.sites, logits, calls, strict=True):
                if len(logits_NE) != mask.numel() * times or times != calls[0]:
                    raise ValueError(
                        f"mask must have an entry for each of the {len(logits_NE)} tokens that "
                        f"{site.name} routed in {times} calls. Got {mask.numel()}"
                    )
            mask = mask.reshape(-1).repeat(calls[0])
        return self.shaper.calculate_meta_loss(logits, _unwrap(self.optimizer), mask, **options)

    def remove(self) -> None:
        """Take the hooks away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def __enter__(self) -> ShapedRouting:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _forget(self) -> None:
        for calls in self._calls:
            calls.clear()

    # The hooks are closures, not methods: a deep copy of the model (for an average of its weights)
    # takes its hooks along, and would copy an object, graph and all, but not a closure. A forward
    # of such a copy isn't one of the model, and nothing of it is kept.

    def _begin_hook(self) -> Callable[..., None]:
        def begin(model: nn.Module, inputs: Any) -> None:
            if model is self.model:
                self._forget()
                self._reading = True

        return begin

    def _end_hook(self) -> Callable[..., None]:
        def end(model: nn.Module, inputs: Any, output: Any) -> None:
            if model is self.model:
                self._reading = False

        return end

    def _router_hook(self, read: ReadLogits, calls: list[Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            # Backward through a checkpoint calls the router again. It must compute here what it
            # computed in the forward, as the same tensors have to be saved; but it isn't kept.
            first = inputs[0] if inputs else next(iter(kwargs.values()))
            logits = read(module, first, output)
            if self._reading:
                calls.append(logits.flatten(0, -2))

        return keep


class _NoOptimizer:
    """Stands where a strategy may look for an optimizer that wasn't given."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(
            "The strategy reads an optimizer's state: shape_routing(model, optimizer), or set "
            "the optimizer attribute before the loss is taken"
        )


def _unwrap(optimizer: Optimizer | None) -> Optimizer:
    """The optimizer that is stepped; accelerate's wrapper runs no step hooks."""
    if optimizer is None:
        return cast(Optimizer, _NoOptimizer())
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
