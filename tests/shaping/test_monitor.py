"""Statistics of the routes, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_onn.shaping import routing_statistics

LOG = math.log


def test_statistics_by_hand() -> None:
    # Probabilities (1/2, 1/4, 1/4, 0), twice the same way round and once rolled by one.
    row = torch.tensor([0.5, 0.25, 0.25, 1e-30]).log()
    found = routing_statistics([torch.stack([row, row, row.roll(1)])], 1)
    assert found.routing_entropy == pytest.approx(1.5 * LOG(2) / LOG(4), rel=1e-5)
    load = -(2 / 3 * LOG(2 / 3) + 1 / 3 * LOG(1 / 3))
    assert found.load_entropy == pytest.approx(load / LOG(4), rel=1e-5)
    assert found.dead_experts == pytest.approx(0.5)
    assert found.top_share == pytest.approx(2 / 3)


def test_the_extremes() -> None:
    even = torch.eye(4) * 1e-4  # undecided tokens, an even load
    found = routing_statistics([even], 1)
    assert found == pytest.approx((1.0, 1.0, 0.0, 0.25), abs=1e-5)
    collapsed = torch.tensor([[80.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    assert routing_statistics([collapsed], 1) == pytest.approx((0.0, 0.0, 0.75, 1.0), abs=1e-5)


def test_routes_are_counted_per_choice_and_averaged_over_sites() -> None:
    one = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0]])  # loads 2, 1, 1, 0
    two = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])  # loads 1, 1, 1, 1
    found = routing_statistics([one, two], 2)
    assert found.top_share == pytest.approx((0.5 + 0.25) / 2)
    assert found.dead_experts == pytest.approx(0.25 / 2)
    assert found.load_entropy == pytest.approx((1.5 * LOG(2) / LOG(4) + 1) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masked_tokens_do_not_count(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 4)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    found = routing_statistics([logits], 2, mask.to(dtype))
    assert found == pytest.approx(routing_statistics([logits[[0, 2, 3]]], 2), rel=1e-6)


def test_one_expert_is_no_division_by_zero() -> None:
    assert routing_statistics([torch.randn(3, 1)], 1) == pytest.approx((0.0, 0.0, 0.0, 1.0))


def test_nothing_joins_the_graph() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    found = routing_statistics([logits], 2)
    assert all(type(value) is float for value in found)
    assert logits.grad is None
