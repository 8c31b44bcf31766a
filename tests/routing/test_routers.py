"""Routers against their formulas in float64, and the one decision that follows them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tiny_onn.routing import ROUTERS, CrossAttentionRouter, LinearRouter, MLPRouter, route
from tiny_onn.routing.routers import (
    AffineRouter,
    QuadraticRouter,
    Router,
    load_balancing_loss,
)

Array = NDArray[np.float64]
D, E = 6, 5


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _linear(x: Array, p: dict[str, Array]) -> Array:
    return x @ p["weight"].T


def _cpr(x: Array, p: dict[str, Array]) -> Array:
    return _unit(x) @ _unit(p["prototypes"]).T


def _capr(x: Array, p: dict[str, Array]) -> Array:
    return np.maximum(x @ p["prototypes"].T / np.sqrt(x.shape[-1]) - p["gates"], 0)


def _mlp(x: Array, p: dict[str, Array]) -> Array:
    hidden = x @ p["up_proj"].T
    return (hidden / (1 + np.exp(-hidden))) @ p["down_proj"].T


def _affine(x: Array, p: dict[str, Array]) -> Array:
    return x @ p["weight"].T + p["bias"]


def _quadratic(x: Array, p: dict[str, Array]) -> Array:
    return (x @ p["up_proj"].T + p["bias"]) ** 2 @ p["down_proj"].T


FORMULAS = {
    "linear": _linear,
    "cpr": _cpr,
    "capr": _capr,
    "mlp": _mlp,
    "affine": _affine,
    "quadratic": _quadratic,
}


def make(name: str) -> Router:
    """A router none of whose parameters stands at a special value."""
    torch.manual_seed(3)
    router = ROUTERS[name](D, E)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return router


def test_every_router_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_its_formula(name: str) -> None:
    router = make(name)
    x = torch.randn(64, D, dtype=torch.float64)
    parameters = {key: p.detach().double().numpy() for key, p in router.named_parameters()}
    expected = FORMULAS[name](x.numpy(), parameters)
    np.testing.assert_allclose(router(x).detach().numpy(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_are_raw_and_reach_every_parameter(name: str) -> None:
    router = make(name)
    x = torch.randn(32, D, requires_grad=True)
    logits = router(x)
    assert logits.shape == (32, E)
    # Probabilities would sum to one in every row.
    assert (logits.sum(-1) - 1).abs().max() > 0.1
    (logits * torch.randn(32, E)).sum().backward()
    for key, parameter in [*router.named_parameters(), ("x", x)]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_are_float32_under_autocast_and_for_bfloat16_tokens(name: str) -> None:
    router = make(name)
    x = torch.randn(16, D)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router(x).dtype == torch.float32
        torch.testing.assert_close(router(x), plain, rtol=0, atol=0)
        rounded = router(x.bfloat16())
    torch.testing.assert_close(rounded, router(x.bfloat16().float()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_fresh_router_is_finite_and_reset_draws_again(name: str) -> None:
    router = ROUTERS[name](D, E)
    assert router(torch.zeros(2, D)).isfinite().all()
    before = router(torch.ones(1, D))
    router.reset_parameters()
    assert not torch.equal(router(torch.ones(1, D)), before)


def test_capr_gates_silence_an_expert() -> None:
    router = CrossAttentionRouter(4, 2)
    with torch.no_grad():
        router.prototypes.fill_(1.0)
        router.gates.copy_(torch.tensor([0.5, 3.0]))
    # <x, p> / sqrt(4) = 2, less a gate of 0.5 and of 3.
    assert router(torch.ones(1, 4)).tolist() == [[1.5, 0.0]]


def test_the_hidden_width_of_the_mlp_router() -> None:
    assert MLPRouter(64, 4).up_proj.shape == (16, 64)
    assert MLPRouter(16, 8).up_proj.shape == (16, 16)
    assert MLPRouter(16, 64).up_proj.shape == (64, 16)
    assert MLPRouter(16, 8, router_hidden_size=3).down_proj.shape == (8, 3)


@pytest.mark.parametrize(("sizes", "name"), [((0, 4), "hidden_size"), ((4, 0), "num_experts")])
def test_a_router_refuses_sizes_below_one(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1. Got 0"):
        LinearRouter(*sizes)


def _parity_accuracy(router: Router) -> float:
    """Held-out accuracy of two experts taught to follow the parity of two signs."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        signs = torch.randint(0, 2, (count, 2), generator=generator)
        noise = 0.2 * torch.randn(count, 8, generator=generator)
        return F.pad(signs * 2.0 - 1, (0, 6)) + noise, signs[:, 0] ^ signs[:, 1]

    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    for _ in range(300):
        x, label = draw(128)
        optimizer.zero_grad()
        F.cross_entropy(router(x), label).backward()
        optimizer.step()
    x, label = draw(1000)
    return float((router(x).argmax(-1) == label).float().mean())


def test_routers_with_a_hidden_layer_learn_a_parity_and_linear_ones_do_not() -> None:
    torch.manual_seed(0)
    assert _parity_accuracy(MLPRouter(8, 2, router_hidden_size=16)) > 0.95
    assert _parity_accuracy(QuadraticRouter(8, 2, rank=4)) > 0.95
    assert _parity_accuracy(LinearRouter(8, 2)) < 0.75
    assert _parity_accuracy(AffineRouter(8, 2)) < 0.75


def test_the_quadratic_router_is_a_parity_when_its_weights_say_so() -> None:
    router = QuadraticRouter(2, 2, rank=2)
    with torch.no_grad():
        router.up_proj.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        router.down_proj.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.randn(500, 2)
    # (a + b)^2 is the larger where the signs agree.
    assert torch.equal(router(x).argmax(-1), (x.prod(-1) < 0).long())


def test_a_fresh_quadratic_router_favours_no_expert() -> None:
    torch.manual_seed(0)
    router = QuadraticRouter(32, 4)
    assert router.up_proj.shape == (8, 32)
    # Each square has a mean of one up to its row's norm, 1 +- 0.25, and the weights sum to zero.
    mean_logits = router(torch.randn(20_000, 32)).mean(0)
    assert mean_logits.abs().max() < 0.6


def test_the_affine_router_picks_the_nearest_prototype_when_its_weights_say_so() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, -2.0]])
    router = AffineRouter(2, 3)
    with torch.no_grad():
        router.weight.copy_(prototypes)
        router.bias.copy_(-prototypes.square().sum(-1) / 2)
    x = 2 * torch.randn(500, 2)
    assert torch.equal(router(x).argmax(-1), torch.cdist(x, prototypes).argmin(-1))


def test_route_takes_one_softmax_over_the_chosen() -> None:
    logits = torch.tensor([[3.0, -1.0, 0.0], [0.5, 0.5, 2.5]])
    routing = route(logits, 2)
    assert routing.indices[0].tolist() == [0, 2]
    assert routing.indices[1, 0] == 2
    # A second softmax would flatten 0.953 to 0.71.
    assert routing.weights[0, 0].item() == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-6)
    assert routing.weights[1, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.logits, logits, rtol=0, atol=0)


def test_route_is_float32_even_from_bfloat16() -> None:
    logits = torch.randn(50, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(logits, 3)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    expected = np.exp(np.sort(logits.double().numpy(), axis=-1)[:, :2:-1])
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.weights.numpy(), expected, rtol=0, atol=1e-6)


def test_route_with_all_experts_is_the_plain_softmax() -> None:
    logits = torch.randn(7, 4)
    routing = route(logits, 4)
    scattered = torch.zeros(7, 4).scatter(1, routing.indices, routing.weights)
    torch.testing.assert_close(scattered, logits.softmax(-1), rtol=0, atol=1e-6)


def test_the_gradient_of_the_weights_stays_among_the_chosen() -> None:
    logits = torch.tensor([[2.0, 1.0, -4.0]], requires_grad=True)
    routing = route(logits, 2)
    routing.weights[0, 0].backward()
    p = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[p * (1 - p), -p * (1 - p), 0.0]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 4])
def test_route_refuses_an_impossible_top_k(top_k: int) -> None:
    with pytest.raises(
        ValueError, match=f"num_experts_per_tok must be between 1 and num_experts=3. Got {top_k}"
    ):
        route(torch.zeros(1, 3), top_k)


def _balance_loss(logits: Array, top_k: int) -> float:
    """E * sum over experts of (share of the tokens that choose e) * (mean probability of e)."""
    tokens, experts = logits.shape
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    load = np.zeros(experts)
    for row in logits:
        for e in np.argsort(-row)[:top_k]:
            load[e] += 1 / tokens
    return float(experts * (load * p.mean(0)).sum())


def test_the_balance_loss_is_its_formula() -> None:
    sites = [torch.randn(40, 5), 3 * torch.randn(40, 5)]
    expected = np.mean([_balance_loss(site.double().numpy(), 2) for site in sites])
    assert load_balancing_loss(sites, 2).item() == pytest.approx(expected, rel=1e-5)
    mask = torch.rand(4, 10) > 0.4
    kept = [site[mask.reshape(-1)].double().numpy() for site in sites]
    expected = np.mean([_balance_loss(site, 2) for site in kept])
    masked = load_balancing_loss(sites, 2, mask.long())
    assert masked.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_loss_is_k_when_even_and_e_when_collapsed(top_k: int) -> None:
    rolled = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])
    assert load_balancing_loss([rolled], top_k).item() == pytest.approx(top_k, rel=1e-5)
    collapsed = torch.tensor([[90.0, 0.0, 0.0, 0.0]]).expand(9, 4)
    assert load_balancing_loss([collapsed], 1).item() == pytest.approx(4, rel=1e-5)
