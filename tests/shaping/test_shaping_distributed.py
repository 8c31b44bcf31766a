"""Shaping in two processes: the same costs, biases and weights as in one."""

from pathlib import Path

import pytest
import torch

from two_ranks import figures_of, run_two


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The figures of both processes."""
    script = Path(__file__).with_name("shaping_processes.py")
    return run_two(script, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("optimizer", ["ars2neo", "adamw"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_costs_are_those_of_a_single_process(ranks, kind, optimizer):
    for figures in figures_of(ranks, f"{kind}-fars-{optimizer}"):
        torch.testing.assert_close(figures["costs"], figures["costs_alone"], rtol=1e-3, atol=0)
        assert figures["costs"].std() > 0.01
        assert figures["distance"] < 2e-5


@pytest.mark.parametrize("optimizer", ["ars2neo", "adamw"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_selection_bias_follows_the_load_of_both(ranks, kind, optimizer):
    first, second = figures_of(ranks, f"{kind}-bias-{optimizer}")
    assert torch.equal(first["bias"], second["bias"]) and first["bias"].any()
    assert torch.equal(first["bias"], first["bias_alone"])
