"""The routed sites of a model, and what a strategy of shaping is told about a batch's routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.routing import MixtureOfExperts


@dataclass(frozen=True, eq=False)
class Site:
    """One router and its experts.

    Attributes:
        name: where the experts stand in the model, for messages.
        num_experts, num_experts_per_tok: E and K.
        experts: the module whose parameters are all stacked, ``[E, ...]``.
        block: the block of ours that joins router and experts; None in other models.
    """

    name: str
    num_experts: int
    num_experts_per_tok: int
    experts: nn.Module
    block: MixtureOfExperts | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The experts' parameters by name, each ``[E, ...]``, as they are now: sharding a model
        puts others in their place."""
        return {f"{self.name}.{key}": p for key, p in self.experts.named_parameters()}


@dataclass(frozen=True)
class Routes:
    """A batch's routes.

    Attributes:
        sites: the S routed sites, in the order of their logits; a site that is computed several
            times, as in a model with recurrences, stands there as often.
        routed: raw router logits ``[N, E]`` of each site, of all tokens, as the model made them.
        optimizer: what holds the experts' parameters; to be read only.
        kept: the places of the tokens that count, or None for all.
        main_loss: the loss that the routing loss is added to, or None where it wasn't given.
        w_meta: weight of the routing loss.
    """

    sites: Sequence[Site]
    routed: Sequence[Tensor]
    optimizer: Optimizer
    kept: Tensor | None = None
    main_loss: Tensor | None = None
    w_meta: float = 1.0

    @cached_property
    def logits(self) -> Sequence[Tensor]:
        """The logits of the tokens that count."""
        if self.kept is None:
            return self.routed
        return [x_NE.index_select(0, self.kept) for x_NE in self.routed]


class UpdateWatch:
    """Calls back after each update of an optimizer, and after its state is loaded.

    Args:
        changed: called with whether it was an update.
    """

    def __init__(self, changed: Callable[[bool], object]) -> None:
        self._changed = changed
        self._optimizer: Optimizer | None = None

    def watch(self, optimizer: Optimizer) -> bool:
        """Watch this optimizer from now on; returns whether it is another one than before."""
        if self._optimizer is optimizer:
            return False
        self._optimizer = optimizer

        def tell(updated: bool) -> None:
            if self._optimizer is optimizer:
                self._changed(updated)

        optimizer.register_step_post_hook(lambda *_: tell(True))
        optimizer.register_load_state_dict_post_hook(lambda *_: tell(False))
        return True


def find_sites(model: nn.Module) -> list[Site]:
    """The model's :class:`~tiny_onn.routing.MixtureOfExperts`, in the order they are computed.

    Raises:
        ValueError: if the model has none.
    """
    sites = [
        Site(
            f"{name}.experts" if name else "experts",
            block.experts.num_experts,
            block.num_experts_per_tok,
            block.experts,
            block,
        )
        for name, block in model.named_modules()
        if isinstance(block, MixtureOfExperts)
    ]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no MixtureOfExperts whose routes to shape")
    return sites
