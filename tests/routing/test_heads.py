"""Attention heads as experts, against a loop over tokens and their experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_onn.routing import LinearRouter, MixtureOfExperts, RoutedHeads
from tiny_onn.routing.experts import Implementation

N, D, E, W = 24, 16, 4, 8

IMPLEMENTATIONS: list[Implementation] = ["grouped", "dense", "loop", "auto"]


def attend(queries_NKW: Tensor) -> Tensor:
    """Stands for attention: mixes tokens, keeps the choices apart."""
    return torch.tanh(queries_NKW + 0.5 * queries_NKW.flip(0))


def make(implementation: Implementation) -> RoutedHeads:
    torch.manual_seed(0)
    return RoutedHeads(E, D, W, implementation)


def choices(pattern: str, top_k: int) -> Tensor:
    if pattern == "one takes all":
        return torch.full((N, 1), 2)
    scores = torch.randn(N, E)
    if pattern == "empty experts":
        scores[:, 1] = scores[:, 3] = -9
    return scores.topk(top_k).indices


def reference(experts: RoutedHeads, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    queries = torch.stack(
        [torch.stack([experts.q_proj[e] @ x[n] for e in indices[n]]) for n in range(len(x))]
    )
    read = attend(queries)
    outputs = []
    for n in range(len(x)):
        parts = [weights[n, k] * (experts.o_proj[e] @ read[n, k]) for k, e in enumerate(indices[n])]
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("pattern", "top_k"),
    [("spread", 1), ("spread", 2), ("spread", E), ("empty experts", 2), ("one takes all", 1)],
)
def test_heads_equal_a_loop(implementation: Implementation, pattern: str, top_k: int) -> None:
    experts = make(implementation)
    indices = choices(pattern, top_k)
    leaves = [torch.randn(N, D), torch.randn(N, top_k).softmax(-1)]
    x, weights = (leaf.requires_grad_() for leaf in leaves)
    inputs = [x, weights, *experts.parameters()]
    upstream = torch.randn(N, D)
    found = experts(x, indices, weights, attend)
    expected = reference(experts, x, indices, weights)
    # Sums of some tens of products of order one in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    for a, b in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("implementation", ["dense", "loop", "auto"])
def test_gradients_are_exact_in_float64(implementation: Implementation) -> None:
    experts = RoutedHeads(3, 5, 4, implementation).double()
    indices = torch.randn(6, 3).topk(2).indices
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: experts(x, indices, w, attend), (x, weights), atol=1e-6
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_autocast_is_near(implementation: Implementation) -> None:
    """Also where runs of rows are filled up, which bfloat16 does on a CPU."""
    experts = make(implementation)
    tokens = 300
    indices = torch.randn(tokens, E).topk(2).indices
    x, weights = torch.randn(tokens, D), torch.full((tokens, 2), 0.5)
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = experts(x, indices, weights, attend)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        gradients.append([y.float(), *torch.autograd.grad(y.float().sum(), experts.parameters())])
    for a, b in zip(*gradients, strict=True):
        # bfloat16 has 8 bits of mantissa: half a percent of the largest entry.
        assert (a - b).abs().max() < 0.02 * b.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_at_all(implementation: Implementation) -> None:
    experts = make(implementation)
    empty = torch.zeros(0, D, requires_grad=True)
    y = experts(empty, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), attend)
    assert y.shape == (0, D)
    y.sum().backward()
    assert experts.q_proj.grad is not None and not experts.q_proj.grad.any()


def test_it_does_not_matter_which_place_an_expert_takes() -> None:
    experts = make("grouped")
    indices = choices("spread", 2)
    x, weights = torch.randn(N, D), torch.rand(N, 2)
    swapped = experts(x, indices.flip(1), weights.flip(1), attend)
    torch.testing.assert_close(experts(x, indices, weights, attend), swapped)


def test_the_router_learns_through_the_mixture() -> None:
    site = MixtureOfExperts(LinearRouter(D, E), make("grouped"), 2)
    x = torch.randn(2, 12, D)
    assert site(x, attend).shape == x.shape
    site(x, attend).square().sum().backward()
    assert site.router.weight.grad.abs().sum() > 0


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="head_size must be at least 1. Got 0"):
        RoutedHeads(2, 4, 0)
