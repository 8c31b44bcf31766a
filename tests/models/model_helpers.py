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


def enable_checkpointing(model: TinyOnnForCausalLM, reentrant: bool = False) -> None:
    """Gradient checkpointing of the kind asked for."""
    # The new name of what transformers before 5.23 calls gradient_checkpointing_enable.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
