"""The routed sites of a model: which experts each router chooses among."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tiny_onn.routing import MixtureOfExperts


@dataclass(frozen=True)
class Site:
    """One router and its experts.

    Attributes:
        name: where it stands in the model, for messages.
        num_experts, num_experts_per_tok: E and K.
        parameters: the experts' parameters by name, each ``[E, ...]``.
    """

    name: str
    num_experts: int
    num_experts_per_tok: int
    parameters: dict[str, nn.Parameter]


def find_sites(model: nn.Module) -> list[Site]:
    """The model's :class:`~tiny_onn.routing.MixtureOfExperts`, in the order they are computed.

    Raises:
        ValueError: if the model has none.
    """
    sites = [
        Site(
            name,
            module.experts.num_experts,
            module.num_experts_per_tok,
            {f"{name}.experts.{key}": p for key, p in module.experts.named_parameters()},
        )
        for name, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
    ]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no MixtureOfExperts whose routes to shape")
    return sites
