"""Tiny models of the architectures that shaping is tested on, and their raw logits by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM

VOCAB, D, E, K = 32, 16, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
MLA = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8
)


def _library(name: str, config: str | None = None, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = getattr(transformers, f"{config or name}Config")(**SIZES, **HEADS, **sizes)
        return getattr(transformers, f"{name}ForCausalLM")(made)

    return make


def _tiny_onn() -> nn.Module:
    sizes = SIZES | {"num_experts": E, "moe_intermediate_size": 8, "position_type": "sequence"}
    return TinyOnnForCausalLM(TinyOnnConfig(**sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": _library("Qwen3Moe", num_experts=E, moe_intermediate_size=8),
    "mixtral": _library("Mixtral", num_local_experts=E, intermediate_size=8),
    "olmoe": _library("Olmoe", num_experts=E, intermediate_size=8),
    "deepseek_v3": _library(
        "DeepseekV3",
        n_routed_experts=E,
        moe_intermediate_size=8,
        first_k_dense_replace=0,
        n_group=2,
        topk_group=1,
        **MLA,
    ),
    "gpt_oss": _library("GptOss", num_local_experts=E, intermediate_size=8),
    # Returns scores first and logits second.
    "llama4": _library(
        "Llama4",
        "Llama4Text",
        num_local_experts=E,
        intermediate_size=8,
        intermediate_size_mlp=8,
        interleave_moe_layer_step=1,
    ),
    "tiny_onn": _tiny_onn,
}


def make_model(name: str) -> nn.Module:
    """A model in training mode whose routers tell tokens apart, and dropout is off."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for router, _ in routed(model):
            for parameter in router.parameters():
                parameter.normal_(std=0.5)
    return model.train()


def routed(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Routers and experts by the names that the architectures give them, in order."""
    pairs = []
    for layer in model.model.layers:
        block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
        if hasattr(layer.self_attn, "heads"):
            pairs.append((layer.self_attn.heads.router, layer.self_attn.heads.experts))
        pairs.append((block.gate if hasattr(block, "gate") else block.router, block.experts))
    return pairs


def raw_logits(router: nn.Module, x: Tensor) -> Tensor:
    """``[N, E]`` from the formula of the architecture's router."""
    x = x.reshape(-1, x.shape[-1])
    if hasattr(router, "up_proj"):
        return F.silu(x @ router.up_proj.T) @ router.down_proj.T
    logits = x @ router.weight.T
    return logits if getattr(router, "bias", None) is None else logits + router.bias


@contextmanager
def router_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each router is given while this is open."""
    seen: list[Tensor] = []
    handles = [
        router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        for router, _ in routed(model)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def make_tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpoint(model: nn.Module, use_reentrant: bool = False) -> None:
    # The new name of what transformers before 5.23 calls gradient_checkpointing_enable.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
