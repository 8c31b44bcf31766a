"""ARS2-Neo in two processes: the same result as in one."""

from pathlib import Path

import pytest
import torch

from two_ranks import figures_of, run_two

MODES = ("off", "sync", "delayed", "adaptive")

# Halves of a batch are averaged in another order than the whole, and Adam's first steps are the
# signs of gradients: a rounding error may be felt, but not grow.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The figures of both processes."""
    script = Path(__file__).with_name("two_processes.py")
    return run_two(script, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("work", ["each", "shared"])
def test_data_parallel_equals_a_single_process(ranks, mode, work):
    first, second = figures_of(ranks, f"ddp-{mode}-{work}")
    assert first["distance"] < TOLERANCE
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["moments"], second["moments"]) and first["moments"].any()
    assert first["passes"] == second["passes"] == first["passes_alone"]
    assert first["phi"] == second["phi"]


@pytest.mark.parametrize("mode", MODES)
def test_sharing_out_the_orthogonalisation_changes_no_bit(ranks, mode):
    each, _ = figures_of(ranks, f"ddp-{mode}-each")
    shared, _ = figures_of(ranks, f"ddp-{mode}-shared")
    assert torch.equal(each["weights"], shared["weights"])


@pytest.mark.parametrize("mode", MODES)
def test_fully_sharded_equals_a_single_process(ranks, mode):
    first, second = figures_of(ranks, f"fsdp-{mode}")
    assert first["sharded"] and second["sharded"]
    assert (first["local_experts"], second["local_experts"]) == (2, 1)
    assert first["distance"] < TOLERANCE
    assert first["passes"] == second["passes"] == first["passes_alone"]
    assert first["diagnostics"] == pytest.approx(first["expected"], rel=1e-3)
    assert second["diagnostics"] == pytest.approx(first["diagnostics"], rel=1e-6)


def test_one_radius_per_tensor_when_sharded(ranks):
    assert figures_of(ranks, "fsdp-tensor")[0]["distance"] < TOLERANCE


def test_a_sharded_run_resumes_bit_for_bit_from_a_distributed_checkpoint(ranks):
    for figures in figures_of(ranks, "checkpoint"):
        assert figures["equal"]
        assert figures["syncs"][0] == figures["syncs"][1] > 1


def test_tensor_parallelism_is_refused_by_name(ranks):
    for figures in figures_of(ranks, "tensor_parallel"):
        assert len(figures["errors"]) == 2
        assert all("tensor parallelism is not supported" in text for text in figures["errors"])
