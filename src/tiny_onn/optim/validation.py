"""What ARS2-Neo refuses, by name and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiny_onn.optim.sharding import local

SAM_MODES = ("off", "sync", "delayed", "adaptive")
UPDATE_SCALES = ("rms", "energy")


def check_arguments(optimizer: Any, sync_every: int, aga_beta: float, aga_lambda: float) -> None:
    """Refuse arguments of the whole optimizer that are out of range."""
    _check_choice("sam", optimizer.sam, SAM_MODES)
    _check_choice("perturb_scope", optimizer.perturb_scope, ("global", "tensor"))
    if not callable(optimizer.newton_schulz):
        _check_choice("newton_schulz", optimizer.newton_schulz, ("quintic", "polar_express"))
    if not (optimizer.ns_dtype in (None, "auto") or isinstance(optimizer.ns_dtype, torch.dtype)):
        raise ValueError(f"ns_dtype must be a dtype, 'auto' or None. Got {optimizer.ns_dtype!r}")
    at_least = {"rho": 0, "alpha": 0, "gamma": 0, "ns_steps": 1}
    for name, least in at_least.items():
        if not getattr(optimizer, name) >= least:
            raise ValueError(f"{name} must be at least {least}. Got {getattr(optimizer, name)}")
    if sync_every < 1:
        raise ValueError(f"sync_every must be at least 1. Got {sync_every}")
    if not 0 <= aga_beta < 1:
        raise ValueError(f"aga_beta must be in [0, 1). Got {aga_beta}")
    if not aga_lambda >= 0:
        raise ValueError(f"aga_lambda must be at least 0. Got {aga_lambda}")


def check_group(group: dict[str, Any]) -> None:
    """Refuse options of a group that are out of range."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"a tensor lr must have 1 element. Got shape {tuple(group['lr'].shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be at least 0. Got {group[name]}")
    for i, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be in [0, 1). Got {beta}")
    _check_choice("update_scale", group["update_scale"], UPDATE_SCALES)
    _check_choice("orthogonal", group["orthogonal"], (None, True, False))
    _check_choice("flatten", group["flatten"], (True, False))


def check_parameter(p: Tensor, group: dict[str, Any]) -> None:
    """Refuse a parameter that the optimizer has no rule for."""
    shape = tuple(p.shape)
    if p.is_complex():
        raise ValueError(f"complex parameters are not supported. Got {p.dtype} of shape {shape}")
    if p.layout != torch.strided:
        raise ValueError(f"sparse parameters are not supported. Got {p.layout} of shape {shape}")
    if group["orthogonal"] and p.ndim not in (2, 3) and not (group["flatten"] and p.ndim > 3):
        raise ValueError(
            f"an orthogonal group takes matrices [m, n] and stacks [E, m, n]. Got shape {shape}: "
            "set flatten=True for convolution kernels, or orthogonal=False"
        )


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parts in this process of the gradients of parameters that all have one.

    Raises:
        ValueError: for a sparse gradient.
    """
    for p in parameters:
        assert p.grad is not None, "a parameter without gradient was not left out"
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"sparse gradients are not supported. Got {p.grad.layout} of shape {tuple(p.shape)}"
            )
    return [local(p.grad) for p in parameters]


def is_orthogonal(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter of this group is orthogonalised or takes AdamW."""
    wanted = group["orthogonal"]
    if wanted is None:
        return p.ndim in (2, 3) or (group["flatten"] and p.ndim > 3)
    return bool(wanted)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}. Got {value!r}")
