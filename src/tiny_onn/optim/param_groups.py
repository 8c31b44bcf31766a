"""Which parameters are orthogonalised and which take AdamW, by what their module is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

_ADAM_MODULES = (nn.Embedding, nn.EmbeddingBag)


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    adam_lr: float | None = None,
    weight_decay: float | None = None,
    adam_weight_decay: float | None = None,
    flatten: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters into ARS2-Neo's two tracks, each parameter exactly once.

    Matrices ``[m, n]`` and stacks of matrices ``[E, m, n]`` are orthogonalised. Embeddings, the
    output head (of models that have ``get_output_embeddings``), vectors and scalars take AdamW, as
    does every parameter of a module that declares ``optim_track = "adamw"``.

    Args:
        lr, weight_decay: of the orthogonalised track; the optimizer's own where None.
        adam_lr, adam_weight_decay: of the AdamW track, likewise.
        flatten: orthogonalise convolution kernels ``[out, in, ...]`` as matrices
            ``[out, in * ...]``, in a group of their own.

    Raises:
        ValueError: for a convolution kernel without ``flatten``, and for a parameter of four or
            more dimensions of any other module.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_ids = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    adam_ids: set[int] = set(head_ids)
    parameters: dict[int, tuple[str, nn.Module, nn.Parameter]] = {}
    for module, name, parameter in _owned(model):
        parameters.setdefault(id(parameter), (name, module, parameter))
        declared = getattr(module, "optim_track", None) == "adamw"
        if declared or isinstance(module, _ADAM_MODULES) or parameter.ndim < 2:
            adam_ids.add(id(parameter))
    matrices, kernels, rest = [], [], []
    for key, (name, module, parameter) in parameters.items():
        is_kernel = isinstance(module, _ConvNd) and parameter.ndim > 2
        if key in adam_ids:
            rest.append(parameter)
        elif is_kernel and flatten:
            kernels.append(parameter)
        elif is_kernel or parameter.ndim > 3:
            hint = "flatten=True makes it a matrix" if is_kernel else "give explicit groups"
            raise ValueError(
                f"{name} of {type(module).__name__} is neither a matrix nor a stack of them, shape "
                f"{tuple(parameter.shape)}: {hint}"
            )
        else:
            matrices.append(parameter)
    orthogonal = {"lr": lr, "weight_decay": weight_decay, "orthogonal": True}
    adam = {"lr": adam_lr, "weight_decay": adam_weight_decay, "orthogonal": False}
    groups = (
        {"params": matrices, **orthogonal},
        {"params": kernels, **orthogonal, "flatten": True},
        {"params": rest, **adam},
    )
    return [
        {key: value for key, value in group.items() if value is not None}
        for group in groups
        if group["params"]
    ]


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield module, f"{prefix}.{name}".lstrip("."), parameter
