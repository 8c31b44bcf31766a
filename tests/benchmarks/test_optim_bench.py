"""The optimizer bench at a tiny size."""

import pytest
import torch
from torch import nn

from tiny_onn.arc import load_tasks
from tiny_onn.arc.batches import BatchConfig
from tiny_onn.arc.recipe import ModelRecipe, Recipe
from tiny_onn.benchmarks.optim import CANDIDATES, bench_case, bench_step

KEYS = {"adamw_ms", "muon_ms", "ars2neo_ms", "ars2neo_loop_ms", "ars2neo_sync_ms"}
RATIOS = {"ars2neo_over_muon", "ars2neo_over_loop"}


def groups():
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(3, 8, 8))]
    return [
        {"params": matrices, "orthogonal": True},
        {"params": [nn.Parameter(torch.randn(8))], "orthogonal": False},
    ]


def test_a_case_has_every_figure():
    figures = bench_case(groups, rounds=2)
    assert figures.keys() >= KEYS | RATIOS
    assert all(figure > 0 for figure in figures.values())
    assert figures["ars2neo_over_muon"] == pytest.approx(figures["ars2neo_ms"] / figures["muon_ms"])


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_really_steps(name):
    made = groups()
    before = [p.detach().clone() for group in made for p in group["params"]]
    step = CANDIDATES[name](made)
    step()
    step()
    separate = "muon" in name
    if not separate:  # where experts are matrices of their own, the parameters given are copied
        after = [p.detach() for group in made for p in group["params"]]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_matrix_at_a_time_gives_the_same_update():
    results = []
    for name in ("ars2neo", "ars2neo_loop"):
        made = groups()
        CANDIDATES[name](made)()
        results.append(torch.cat([p.detach().flatten() for g in made for p in g["params"]]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_a_training_step_in_every_mode():
    model = ModelRecipe(hidden_size=32, num_hidden_layers=1, moe_intermediate_size=32)
    recipe = Recipe(model=model, batches=BatchConfig(batch_tokens=256))
    figures = bench_step(recipe, list(load_tasks("arcagi", ids=["b1948b0a"])), steps=6)
    assert figures.keys() == {"off_ms", "sync_over_off", "adaptive_over_off", "sync_rate"}
    assert figures["off_ms"] > 0 and figures["sync_over_off"] > 1
    assert 0 < figures["sync_rate"] <= 1
