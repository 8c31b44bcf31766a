"""Which parameters are orthogonalised and which take AdamW, by what their module is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_ADAM_MODULES = (nn.Embedding, nn.EmbeddingBag)


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    adam_lr: float | None = None,
    weight_decay: float | None = None,
    adam_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into ARS2-Neo's two tracks, each parameter exactly once.

    Matrices ``[m, n]`` and stacks of matrices ``[E, m, n]`` are orthogonalised. Embeddings, the
    output head (of models that have ``get_output_embeddings``), vectors and scalars take AdamW, as
    does every parameter of a module that declares ``optim_track = "adamw"``.

    Args:
        lr, weight_decay: of the orthogonalised track; the optimizer's own where None.
        adam_lr, adam_weight_decay: of the AdamW track, likewise.

    Raises:
        ValueError: for a parameter of four or more dimensions (a convolution kernel): flatten it,
            or give its groups by hand.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_ids = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    adam_ids: set[int] = set(head_ids)
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for module, name, parameter in _owned(model):
        parameters.setdefault(id(parameter), (name, parameter))
        declared = getattr(module, "optim_track", None) == "adamw"
        if declared or isinstance(module, _ADAM_MODULES) or parameter.ndim < 2:
            adam_ids.add(id(parameter))
    matrices, rest = [], []
    for key, (name, parameter) in parameters.items():
        if key in adam_ids:
            rest.append(parameter)
        elif parameter.ndim > 3:
            raise ValueError(
                f"{name} has {parameter.ndim} dimensions {tuple(parameter.shape)}: flatten it to a "
                "matrix, or give the optimizer explicit groups"
            )
        else:
            matrices.append(parameter)
    tracks = ((matrices, True, lr, weight_decay), (rest, False, adam_lr, adam_weight_decay))
    return [_group(*track) for track in tracks if track[0]]


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield module, f"{prefix}.{name}".lstrip("."), parameter


def _group(
    parameters: list[nn.Parameter], orthogonal: bool, lr: float | None, weight_decay: float | None
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "orthogonal": orthogonal}
    given = {"lr": lr, "weight_decay": weight_decay}
    return group | {name: value for name, value in given.items() if value is not None}
