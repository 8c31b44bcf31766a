"""Small models, and token sequences that look like tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import MakeModel, MakeTokens
from torch import Tensor

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> MakeModel:
    """A model in evaluation mode with seeded weights; keywords change the configuration."""

    def make(**changes: Any) -> TinyOnnForCausalLM:
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 16,
            "num_tasks": 3,
        }
        torch.manual_seed(0)
        return TinyOnnForCausalLM(TinyOnnConfig(**(sizes | changes))).eval()

    return make


@pytest.fixture
def make_tokens() -> MakeTokens:
    """Random cells, row ends and grid markers ``[batch, length]``, each row opened by a marker."""

    def make(batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 13, (batch, length), generator=generator)
        ids[:, 0] = 11
        return ids

    return make
