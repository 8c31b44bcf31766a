"""Orthogonalisation of matrices by Newton-Schulz iterations.

An iteration ``X <- aX + b(XXᵀ)X + c(XXᵀ)²X`` maps every singular value by an odd polynomial and
keeps the singular vectors; iterated, it drives all singular values towards 1 and so X towards the
orthogonal factor of its polar decomposition, with matrix products alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
Method = str | Callable[[Tensor], Tensor]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Muon's polynomial (Jordan et al., 2024): five rounds send singular values above about 0.01 into
0.68-1.14. It trades accuracy at 1 for a steep slope at 0."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""The minimax-optimal polynomial of each round (arXiv:2505.16932, table for the lower bound 1e-3);
the last one is repeated."""

CPU_PIECE_BYTES = 1 << 20
"""On a CPU a batch is cut into pieces of about this size, so that one stays in the cache through
all rounds."""

CPU_BFLOAT16_ROWS = 128
"""On a CPU the bfloat16 product of smaller matrices gains less than its set-up costs."""


def orthogonalize(
    x: Tensor,
    *,
    method: Method = "quintic",
    steps: int = 5,
    dtype: torch.dtype | str | None = None,
) -> Tensor:
    """The nearest matrix with all singular values about 1, for each matrix of a batch.

    Args:
        x: matrices ``[..., m, n]``, of any floating dtype.
        method: ``"quintic"``, ``"polar_express"``, or a function that maps matrices ``[B, r, c]``
            with r <= c and Frobenius norm at most 1 to their orthogonal factors.
        steps: rounds of the iteration.
        dtype: dtype to iterate in; by default float32, or float64 for float64 matrices. ``"auto"``
            takes bfloat16 where that is faster.

    Returns:
        ``[..., m, n]`` in the dtype of x. A zero matrix stays zero, and one whose norm is next to
        nothing (below 1e-16 in float32) counts as zero. What is computed for one
        matrix does not depend on the others of the batch.

    Raises:
        ValueError: for fewer than two dimensions or an unknown method.
    """
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions. Got shape {tuple(x.shape)}")
    rounds = _rounds(method, steps)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    batch = wide.reshape(-1, *wide.shape[-2:])
    batch = batch.to(_iteration_dtype(batch, dtype))
    norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True)
    # A little below 1, so that rounding can't push a singular value over the polynomials' range.
    # Where the squares of the entries fall out of the dtype's range the norm is no norm any more.
    least = 1e3 * math.sqrt(torch.finfo(batch.dtype).tiny)
    batch = batch / torch.where(norm < least, torch.inf, norm * 1.01)
    done = torch.cat([rounds(piece) for piece in _pieces(batch)]) if len(batch) else batch
    done = done.to(x.dtype).view(wide.shape)
    return done if wide is x else done.mT


def _rounds(method: Method, steps: int) -> Callable[[Tensor], Tensor]:
    if callable(method):
        return method
    if method == "quintic":
        table: tuple[Coefficients, ...] = (QUINTIC,) * steps
    elif method == "polar_express":
        table = (POLAR_EXPRESS + POLAR_EXPRESS[-1:] * steps)[:steps]
    else:
        raise ValueError(f"method must be 'quintic', 'polar_express' or a function. Got {method!r}")

    def iterate(x: Tensor) -> Tensor:
        for a, b, c in table:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    return iterate


def _iteration_dtype(batch: Tensor, dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if batch.dtype == torch.float64:
        return torch.float64
    small = batch.device.type == "cpu" and batch.shape[-2] < CPU_BFLOAT16_ROWS
    return torch.float32 if dtype is None or small else auto_dtype(batch.device)


def _pieces(batch: Tensor) -> tuple[Tensor, ...]:
    if batch.device.type != "cpu":
        return (batch,)
    each = max(1, CPU_PIECE_BYTES // (batch[0].numel() * batch.element_size()))
    return batch.split(each)


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # torch has no public question for this; where it is gone, float32 is right, only slower.
    native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    is_native = device.type == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in native)
    return torch.bfloat16 if is_native else torch.float32
