"""The optimizers that the study compares, built alike from one learning rate and one radius."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.optim import ARS2Neo, param_groups

ABLATIONS = ("coin", "delayed")
"""AGA's second passes at other times: as many at random, and as many at even intervals."""

ARMS = ("adamw", "muon", "sam_adamw", "off", "sync", "adaptive", *ABLATIONS)
"""AdamW; Muon on matrices with AdamW on the rest; SAM (arXiv:2010.01412) on AdamW; ARS2-Neo
without second passes, with one in every step, with AGA's, and its ablations."""

TWO_PASS = ("sam_adamw", "sync", "adaptive", *ABLATIONS)

LONGEST = 10
"""Steps after which AGA takes a second pass whatever the geometry."""

NEVER = 10**9


def build(
    arm: str,
    model: nn.Module,
    *,
    lr: float,
    rho: float = 0.05,
    adam_lr: float | None = None,
    weight_decay: float = 0.1,
    adam_weight_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    coin_rate: float = 0.0,
    seed: int = 0,
) -> Optimizer:
    """An optimizer of a model's parameters, whose ``step(closure)`` calls it once or twice.

    Args:
        arm: one of :data:`ARMS`.
        lr: of the matrices, in AdamW's units; adam_lr: of everything else, by default the same.
        rho: radius of the second pass.
        coin_rate: share of the steps with a second pass, for the ablations; seed: of the throws.
    """
    groups = param_groups(
        model,
        lr=lr,
        adam_lr=adam_lr or lr,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay if adam_weight_decay is None else adam_weight_decay,
        flatten=True,
    )
    if arm == "adamw":
        return torch.optim.AdamW(_plain(groups), betas=betas)
    if arm == "muon":
        return StackedMuon(groups, betas)
    if arm == "sam_adamw":
        return _SAM(_plain(groups), torch.optim.AdamW, rho=rho, betas=betas)
    if arm == "coin":
        return ARS2Neo(
            groups,
            betas=betas,
            sam="adaptive",
            rho=rho,
            sync_every=NEVER,
            trigger=coin(coin_rate, seed),
            ns_dtype="auto",
        )
    every = max(1, round(1 / coin_rate)) if arm == "delayed" else LONGEST
    return ARS2Neo(groups, betas=betas, sam=arm, rho=rho, sync_every=every, ns_dtype="auto")


def step(optimizer: Optimizer, loss_of: Callable[[], Tensor]) -> int:
    """One step of an optimizer; returns how many forward-backward passes it took."""
    passes = 0

    def closure() -> float:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return passes


def coin(rate: float, seed: int) -> Callable[[object], bool]:
    """A trigger that fires in a share of the steps, whatever the geometry."""
    throws = random.Random(seed)
    return lambda alignment: throws.random() < rate


class StackedMuon(Optimizer):
    """torch's Muon on every matrix of a stack by itself, AdamW on the other track.

    Args:
        groups: ARS2-Neo's two tracks, as :func:`tiny_onn.optim.param_groups` makes them.
        betas: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"flatten": False})
        self._inner: list[Optimizer] = []
        self._views: list[list[nn.Parameter]] = []
        for group in self.param_groups:
            own = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if group["orthogonal"]:
                views = [nn.Parameter(m) for p in group["params"] for m in _matrices(p, group)]
                self._inner.append(torch.optim.Muon(views, adjust_lr_fn="match_rms_adamw", **own))
            else:
                views = []
                self._inner.append(torch.optim.AdamW(group["params"], betas=betas, **own))
            self._views.append(views)

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group, inner, views in zip(self.param_groups, self._inner, self._views, strict=True):
            if views:
                gradients = [m for p in group["params"] for m in _matrices(p.grad, group)]
                for view, gradient in zip(views, gradients, strict=True):
                    view.grad = gradient
            inner.param_groups[0]["lr"] = group["lr"]
            inner.step()
        return loss


class _SAM(pytorch_optimizer.SAM):
    """The library's SAM with PyTorch's own contract of a closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        super().step(closure)
        return loss


def _matrices(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The matrices of a parameter or gradient, sharing its memory."""
    flat = x.detach().flatten(1) if group["flatten"] else x.detach()
    return list(flat.view(-1, *flat.shape[-2:])) if flat.ndim > 1 else [flat]


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
