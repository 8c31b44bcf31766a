"""Our model and its peers at one size: the same widths, layers, heads (of keys and values, too) and
vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.routing.experts import Experts, Implementation

VOCABULARY = 512


@dataclass(frozen=True)
class Size:
    """A model and a batch: B rows of T tokens."""

    hidden: int
    layers: int
    heads: int
    experts: int
    chosen: int
    width: int
    batch: int
    tokens: int


SIZES = {
    "S": Size(128, 2, 4, 4, 2, 128, batch=2, tokens=1024),
    "M": Size(256, 4, 8, 16, 4, 256, batch=4, tokens=512),
}
"""Expert width is the hidden size."""


def ours(size: Size, implementation: Implementation = "auto") -> nn.Module:
    """Our model as an ordinary language model, with one implementation of all experts."""
    config = TinyOnnConfig(
        **_common(size),
        num_experts=size.experts,
        num_experts_per_tok=size.chosen,
        moe_intermediate_size=size.width,
        position_type="sequence",
        num_symmetries=0,
        **_plain_tokens(),
    )
    model = TinyOnnForCausalLM(config)
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = implementation
    return model


def qwen3_moe(size: Size) -> nn.Module:
    """transformers' own mixture of experts, with as many experts of the same width."""
    config = Qwen3MoeConfig(
        **_common(size),
        num_experts=size.experts,
        num_experts_per_tok=size.chosen,
        moe_intermediate_size=size.width,
        **_plain_tokens(),
    )
    return Qwen3MoeForCausalLM(config)


def dense(size: Size) -> nn.Module:
    """A dense model whose feed-forward block is as wide as the chosen experts together."""
    config = Qwen3Config(
        **_common(size),
        intermediate_size=size.chosen * size.width,
        **_plain_tokens(),
    )
    return Qwen3ForCausalLM(config)


def active_parameters(model: nn.Module, size: Size) -> int:
    """Parameters that one token is multiplied with: all, but of experts the chosen ones."""
    active = 0
    for name, p in model.named_parameters():
        is_stack = p.ndim == 3 and p.shape[0] == size.experts
        if "embed_tokens" not in name:
            active += p.numel() * size.chosen // size.experts if is_stack else p.numel()
    return active


def forward_flops(model: nn.Module, size: Size, *, causal: bool = True) -> int:
    """Floating-point operations of the matrix products in one forward pass of a batch.

    Two for each active weight and token, and attention's two products.

    Args:
        causal: count of attention what the causal mask lets through, and not whole rows.
    """
    tokens = size.batch * size.tokens
    matrices = active_parameters(model, size) - _vectors(model)
    keys = (size.tokens + 1) / 2 if causal else size.tokens
    return round(2 * tokens * (matrices + 2 * size.layers * keys * size.hidden))


def _vectors(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim == 1)


def _common(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // size.chosen,
        "head_dim": size.hidden // size.heads,
        "max_position_embeddings": 4096,
    }


def _plain_tokens() -> dict[str, None]:
    """No token ends a sequence."""
    return {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def random_tokens(size: Size, seed: int = 0) -> torch.Tensor:
    """Tokens ``[B, T]`` of a size's batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (size.batch, size.tokens), generator=generator)
