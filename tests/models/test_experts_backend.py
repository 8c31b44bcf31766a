"""The library's switch of experts, on our model and of ours on another."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, assert_near
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.models.experts_backend import IMPLEMENTATIONS
from tiny_onn.routing.experts import Experts

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "grouped_mm"])
def test_every_implementation_agrees_and_reaches_all_experts(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path, name: str
) -> None:
    how = IMPLEMENTATIONS.get(name, "auto")
    model, ids = make_model(), make_tokens(2, 40)
    expected = model(ids).logits
    model.set_experts_implementation(name)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert {module.implementation for module in experts} == {how}
    assert_near(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
    assert again.model.layers[0].mlp.experts.implementation == how
    plain = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert plain.model.layers[0].self_attn.heads.experts.implementation == "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
def test_the_librarys_own_functions_are_called(
    make_model: MakeModel, make_tokens: MakeTokens, name: str, dtype: torch.dtype
) -> None:
    model, ids = make_model().to(dtype), make_tokens(2, 20)
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(name)
    called = Mock(wraps=ALL_EXPERTS_FUNCTIONS[name])
    with patch.dict(ALL_EXPERTS_FUNCTIONS._global_mapping, {name: called}):
        found = model(ids).logits
        assert called.call_count == 2
        # A strategy of shaping that watches the products watches ours.
        model.model.layers[0].mlp.experts.observer = lambda rows: lambda x, y: None
        model(ids)
        assert called.call_count == 3
    # Roundings of products in another order: 8 bits in bfloat16, 11 in float16.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    assert (found - expected).abs().median() < tolerance


def test_experts_of_other_ranks_add_nothing(make_model: MakeModel) -> None:
    """As under expert parallelism, where they go by a number beyond those of this rank."""
    experts = make_model(num_experts=4).model.layers[0].mlp.experts
    x = torch.randn(30, 32)
    indices, weights = torch.randint(0, 5, (30, 2)), torch.rand(30, 2)
    here = indices < 4
    expected = sum(
        experts(x, indices[:, k : k + 1].clamp(max=3), (weights * here)[:, k : k + 1])
        for k in (0, 1)
    )
    experts._is_expert_parallel = True
    assert_near(experts(x, indices, weights), expected)


def test_an_unknown_implementation_is_named(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="must be one of batched_mm, .*tiny_onn. Got 'magic'"):
        make_model().set_experts_implementation("magic")


def test_another_model_takes_ours(make_tokens: MakeTokens) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=8, norm_topk_prob=True)
    )
    ids = make_tokens(2, 30)
    found = []
    for name in ("eager", "tiny_onn"):
        model.zero_grad()
        model.set_experts_implementation(name)
        out = model(ids, labels=ids)
        out.loss.backward()
        experts = model.model.layers[0].mlp.experts
        found.append(
            (out.logits, experts.gate_up_proj.grad, model.model.layers[0].mlp.gate.weight.grad)
        )
    for eager, ours in zip(*found, strict=True):
        assert_near(ours, eager)


def test_experts_of_another_form_are_refused(make_tokens: MakeTokens) -> None:
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16))
    model.set_experts_implementation("tiny_onn")
    with pytest.raises(ValueError, match="GptOssExperts is of another form"):
        model(make_tokens(1, 5))
