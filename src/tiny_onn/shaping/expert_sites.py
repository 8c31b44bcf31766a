"""The routed sites of mixtures of experts that aren't ours, and how to read their raw logits.

Shapes: N tokens, D hidden size, E experts.

No module or parameter is told by its name. A site is a block with two children: experts, that is a
module with ``num_experts = E`` whose parameters are all stacked ``[E, ...]``, and a router, that is
a module with a matrix ``[E, D]`` and no other parameter of more than E entries. In the transformers
library that is how Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, gpt-oss and most others are written;
other models are described by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.routing import MixtureOfExperts
from tiny_onn.shaping.sites import Site

ReadLogits = Callable[[nn.Module, Tensor, Any], Tensor]
"""Raw logits ``[..., E]`` of a router, from the module, its first input and its output."""

_HELP = "Describe the sites: shape_routing(model, optimizer, sites=[ExpertSite(...), ...])"


@dataclass(frozen=True)
class ExpertSite:
    """One routed site of a model, described by its modules.

    Attributes:
        router: the module whose call decides the routes.
        experts: the module whose parameters are all stacked, ``[E, ...]``.
        num_experts_per_tok: K.
        logits: maps (router, its first input, its output) to raw logits ``[..., E]`` that carry
            gradient. None stands for :class:`LinearLogits`.
    """

    router: nn.Module
    experts: nn.Module
    num_experts_per_tok: int
    logits: ReadLogits | None = None

    def resolve(self, model: nn.Module) -> Site:
        """The :class:`~tiny_onn.shaping.sites.Site` that shapers take.

        Raises:
            ValueError: if the model doesn't hold both modules, or the experts aren't stacked.
        """
        names = {module: name for name, module in model.named_modules()}
        for module in (self.router, self.experts):
            if module not in names:
                raise ValueError(
                    f"{type(model).__name__} doesn't hold the {type(module).__name__} of this site"
                )
        name = names[self.experts]
        parameters = {f"{name}.{key}": p for key, p in self.experts.named_parameters()}
        sizes = {p.shape[0] if p.ndim else 0 for p in parameters.values()}
        mixed = isinstance(self.experts, nn.ModuleList) or self.router in self.experts.modules()
        if mixed or len(sizes) != 1:
            raise ValueError(
                f"The experts of {name!r} must be a module of nothing but stacked parameters, "
                f"[E, ...]. Got {type(self.experts).__name__}"
            )
        return Site(name, sizes.pop(), self.num_experts_per_tok, self.experts, _block(model, self))


def _block(model: nn.Module, site: ExpertSite) -> MixtureOfExperts | None:
    """The block of ours whose experts these are."""
    blocks = (m for m in model.modules() if isinstance(m, MixtureOfExperts))
    return next((block for block in blocks if block.experts is site.experts), None)


def find_expert_sites(model: nn.Module) -> list[ExpertSite]:
    """The routed sites that are found in a model (see the module's docstring), ours included.

    Raises:
        ValueError: if there are none, or it can't be told which router experts have, or how many
            experts a token is given.
    """
    found = []
    for name, block in model.named_modules():
        if isinstance(block, MixtureOfExperts):
            found.append(
                ExpertSite(block.router, block.experts, block.num_experts_per_tok, _output)
            )
            continue
        for experts in block.children():
            num_experts = _stacked(experts)
            if num_experts is None:
                continue
            routers = [child for child in block.children() if _matrix(child, num_experts)]
            if len(routers) != 1:
                raise ValueError(
                    f"Expected one router beside the {num_experts} experts of {name!r}: a module "
                    f"with a matrix [{num_experts}, D] and little else. Got {len(routers)}. {_HELP}"
                )
            top_k = _top_k(model, block, routers[0])
            if top_k is None:
                raise ValueError(f"{name!r} has no num_experts_per_tok or top_k. {_HELP}")
            found.append(ExpertSite(routers[0], experts, top_k))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no routed site. Looked for MixtureOfExperts, and for "
            "blocks with two children: experts (a module with num_experts = E whose parameters "
            "are all stacked, [E, ...]) and a router (a module with a matrix [E, D] and no other "
            "parameter of more than E entries). "
            f"{_separate_experts(model)}{_HELP}"
        )
    return found


class LinearLogits:
    """Reads the raw logits ``W x (+ b)`` of a router, whatever the module returns.

    At the first call it looks where in the output they stand. Where the module returns only
    probabilities, possibly under the name of logits, they are computed again from the input.

    Args:
        router: a module with one matrix ``W [E, D]``, and its bias if there is one.
        num_experts: E; name: for messages.

    Raises:
        ValueError: if the output holds neither ``W x (+ b)`` nor a softmax or sigmoid of it:
            something else is done to the input or to the logits.
    """

    def __init__(self, router: nn.Module, num_experts: int, name: str) -> None:
        matrix = _matrix(router, num_experts)
        if matrix is None:
            raise ValueError(
                f"The router of {name} ({type(router).__name__}) is no matrix [{num_experts}, D]. "
                "Give its ExpertSite logits=: a function of (router, input, output)"
            )
        self.owner, self.key = matrix
        self.name = name
        self._place: int | None = None
        self._looked = False

    def __call__(self, router: nn.Module, hidden_states: Tensor, output: Any) -> Tensor:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        if not self._looked:
            self._place, self._looked = self._look(hidden_states, outputs), True
        return self._compute(hidden_states) if self._place is None else outputs[self._place]

    def _compute(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self.owner, self.key), getattr(self.owner, "bias", None)
        return F.linear(x.to(weight.dtype), weight, bias if isinstance(bias, Tensor) else None)

    @torch.no_grad()
    def _look(self, hidden_states: Tensor, outputs: Any) -> int | None:
        """The place of the raw logits among the outputs, None if only their probabilities are."""
        logits = self._compute(hidden_states).float()
        probabilities = (logits.softmax(-1), logits.sigmoid())
        for place, output in enumerate(outputs):
            if _close(output, logits):
                return place
        if any(_close(output, p) for output in outputs for p in probabilities):
            return None
        raise ValueError(
            f"The router of {self.name} ({type(self.owner).__name__}) returns neither W x + b nor "
            "a softmax or sigmoid of it, so its raw logits can't be told. "
            "Give its ExpertSite logits=: a function of (router, input, output)"
        )


def _close(output: Any, expected: Tensor) -> bool:
    """Whether they are the same up to the rounding of half precision."""
    if not isinstance(output, Tensor) or output.numel() != expected.numel():
        return False
    error = (output.float().reshape(expected.shape) - expected).norm()
    return bool(error <= 0.02 * expected.norm())


def _output(router: nn.Module, hidden_states: Tensor, output: Any) -> Tensor:
    return output


def _stacked(module: nn.Module) -> int | None:
    """E of a module of stacked experts, None of any other."""
    num_experts = getattr(module, "num_experts", None)
    # A block may have num_experts as well: the matrices must be the module's own.
    own = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    if not own or not isinstance(num_experts, int):
        return None
    stacked = all(parameter.shape[:1] == (num_experts,) for parameter in module.parameters())
    return num_experts if stacked else None


def _matrix(module: nn.Module, num_experts: int) -> tuple[nn.Module, str] | None:
    """Which module holds a router's one matrix ``[E, D]``, and under which name; None of a module
    that is no such router."""
    found = [
        (owner, key, parameter)
        for owner in module.modules()
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter.numel() > num_experts
    ]
    if len(found) != 1:
        return None
    owner, key, parameter = found[0]
    fits = parameter.ndim == 2 and len(parameter) == num_experts
    return (owner, key) if fits else None


def _top_k(model: nn.Module, block: nn.Module, router: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    said = [
        getattr(module, key, None)
        for module in (router, block)
        for key in ("num_experts_per_tok", "top_k")
    ]
    # A config's top_k is that of sampling.
    said.append(getattr(config, "num_experts_per_tok", None))
    return next((value for value in said if isinstance(value, int)), None)


def _separate_experts(model: nn.Module) -> str:
    """A word on experts that stand in a list of modules, if there seem to be any."""
    for name, block in model.named_modules():
        for key, child in block.named_children():
            if isinstance(child, nn.ModuleList) and any(
                _matrix(other, len(child)) for other in block.children() if other is not child
            ):
                return f"{f'{name}.{key}'!r} is an nn.ModuleList: its experts must be stacked. "
    return ""
