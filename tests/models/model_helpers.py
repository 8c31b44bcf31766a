"""What the model tests share: the types of their fixtures, and one tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiny_onn.models import TinyOnnForCausalLM

MakeModel = Callable[..., TinyOnnForCausalLM]
MakeTokens = Callable[..., Tensor]


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 sums in another order, of logits of order one."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
