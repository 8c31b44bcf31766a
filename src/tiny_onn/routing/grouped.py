"""Products of rows sorted by expert: each run of rows is multiplied by its expert's matrix.

Shapes: P rows, D and O widths, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    """``x[p] @ weight[e(p)].T`` for rows sorted by expert.

    Args:
        x_PD: rows sorted by expert ``[P, D]``, float32 or bfloat16.
        weight_EOD: one matrix per expert ``[E, O, D]``, of the same dtype.
        offsets_E: the end of each expert's run of rows, int32 ``[E]``.
    """
    # torch's own operator can't be traced for a CPU: it claims to take bfloat16 alone.
    if torch.compiler.is_compiling() and x_PD.device.type == "cpu":
        return traceable_linear(x_PD, weight_EOD, offsets_E)
    return F.grouped_mm(x_PD, weight_EOD.transpose(-2, -1), offs=offsets_E)


def loop_linear(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    """The same as :func:`grouped_linear`, one expert after the other, for any dtype and width."""
    runs = x_PD.tensor_split(offsets_E[:-1].tolist())
    return torch.cat([F.linear(run, weight_EOD[e]) for e, run in enumerate(runs)])


def grouped_mm_accepts(dtype: torch.dtype, *widths: int) -> bool:
    """Whether ``grouped_mm`` takes this dtype and these row widths (strides of 16 bytes)."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def few_lengths_pay(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to fill up experts' runs, so that few are of different lengths.

    On a CPU every bfloat16 product of a new shape is compiled anew (about a millisecond); with
    runs of a few dozen lengths the compiled ones are found again.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling()


@torch.library.custom_op("tiny_onn::grouped_linear", mutates_args=())
def traceable_linear(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`grouped_linear` as an operator of its own, which ``torch.compile`` leaves whole."""
    return F.grouped_mm(x_PD, weight_EOD.transpose(-2, -1), offs=offsets_E)


@torch.library.custom_op("tiny_onn::grouped_outer", mutates_args=())
def traceable_outer(grad_PO: Tensor, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
    """``sum over an expert's rows of grad[p] x[p]``: the gradient ``[E, O, D]`` of the weights."""
    return F.grouped_mm(grad_PO.t(), x_PD, offs=offsets_E)


@traceable_linear.register_fake
def _(x_PD: Tensor, weight_EOD: Tensor, offsets_E: Tensor) -> Tensor:
    return x_PD.new_empty(x_PD.shape[0], weight_EOD.shape[1])


@traceable_outer.register_fake
def _(grad_PO: Tensor, x_PD: Tensor, offsets_E: Tensor) -> Tensor:
    return x_PD.new_empty(offsets_E.shape[0], grad_PO.shape[1], x_PD.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_PD, weight_EOD, offsets_E = ctx.saved_tensors
    grad_PO = grad_PO.contiguous()
    # Rows of grad times the expert's matrix is the same product with the matrices turned.
    grad_x_PD = traceable_linear(grad_PO, weight_EOD.transpose(-2, -1), offsets_E)
    return grad_x_PD, traceable_outer(grad_PO, x_PD, offsets_E), None


traceable_linear.register_autograd(_backward, setup_context=_keep)
