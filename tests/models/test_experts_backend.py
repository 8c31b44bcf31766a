"""The library's switch of experts, on our model and of ours on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, assert_near
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_agrees_and_reaches_all_experts(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path, name: str
) -> None:
    model, ids = make_model(), make_tokens(2, 40)
    expected = model(ids).logits
    model.set_experts_implementation(name)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert {module.implementation for module in experts} == {IMPLEMENTATIONS[name]}
    assert_near(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
    assert again.model.layers[0].mlp.experts.implementation == IMPLEMENTATIONS[name]
    plain = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert plain.model.layers[0].self_attn.heads.experts.implementation == "auto"


def test_an_unknown_implementation_is_named(make_model: MakeModel) -> None:
    known = "tiny_onn, eager, grouped_mm, batched_mm"
    with pytest.raises(ValueError, match=f"must be one of {known}. Got 'sonicmoe'"):
        make_model().set_experts_implementation("sonicmoe")


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
