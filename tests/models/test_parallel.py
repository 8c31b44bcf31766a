"""The library's parallel plans: a model in two processes computes what it does in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import MakeModel
from parallel_processes import SHARES, SIZES
from transformers import PreTrainedModel

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from two_ranks import figures_of, run_two

EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
HEADS = {f"self_attn.{part}" for part in ("kv_proj.weight", "heads.experts.q_proj")}

NEEDS_EXPERT_PLANS = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "ep_plan"), reason="transformers before 5.21 has no ep_plan"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    TinyOnnForCausalLM(TinyOnnConfig(**SIZES)).save_pretrained(folder / "model")
    yield run_two(Path(__file__).with_name("parallel_processes.py"), folder)


@pytest.mark.parametrize(
    "name",
    [
        name if "ep_size" not in shares else pytest.param(name, marks=NEEDS_EXPERT_PLANS)
        for name, shares in SHARES.items()
    ],
)
def test_a_shared_out_model_computes_the_same(ranks: list[Any], name: str) -> None:
    for figures in figures_of(ranks, name):
        # Sums over two processes, in another order; gradients relative to their norms.
        assert figures["logits"] < 1e-5 and figures["gradients"] < 1e-5
        assert figures["answers"]
        expected = EXPERTS | (HEADS if "tp_size" in SHARES[name] else set())
        assert {f"model.layers.1.{part}" for part in expected} <= set(figures["shared"])


def test_data_parallelism_finds_every_gradient(ranks: list[Any]) -> None:
    first, second = figures_of(ranks, "ddp")
    assert first["missing"] == second["missing"] == []
    assert torch.equal(first["gradients"], second["gradients"]) and first["gradients"].any()


@pytest.mark.parametrize("changes", [{}, {"shared_expert_intermediate_size": 8}])
@pytest.mark.parametrize("heads", [2, 4])
def test_plans_name_what_the_model_has(
    make_model: MakeModel, changes: dict[str, int], heads: int
) -> None:
    """Attention is left whole where its experts don't have a query head for each key."""
    model = make_model(num_attention_heads=4, num_key_value_heads=heads, **changes)
    names = {name.replace(".0.", ".*.") for name, _ in model.named_modules()}
    names |= {name.replace(".0.", ".*.") for name, _ in model.named_parameters()}
    for plan in (model.tp_plan, getattr(model, "ep_plan", model.tp_plan)):
        assert plan.keys() <= names
        assert {f"model.layers.*.{part}" for part in EXPERTS} <= plan.keys()
    assert ("model.layers.*.self_attn.heads.experts" in model.tp_plan) is (heads == 2)
    assert model.fsdp_plan["model.layers.*"] == "free_full_weight"
    assert "tp_plan" not in model.config.to_json_string()
    assert "ep_plan" not in model.config.to_json_string(use_diff=False)
