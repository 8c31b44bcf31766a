"""SARS against a gradient taken token by token."""

from __future__ import annotations

import pytest
import torch
from moe_models import make_model
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import silu
from torch.optim import Adam

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import RoutingShaper, SurpriseShaper, shape_routing
from tiny_onn.shaping.sites import Routes, find_sites

N, D, E, K, W = 5, 8, 4, 2, 4


def make_block(width: int | None, top_k: int = K) -> MixtureOfExperts:
    torch.manual_seed(0)
    experts = GroupedExperts(E, D, intermediate_size=width)
    return MixtureOfExperts(LinearRouter(D, E), experts, top_k).double()


def by_token(block: MixtureOfExperts, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Importance and cost ``[N, E]``: each token computed by copies of the experts of its own."""
    logits = block.router(x)
    routing = block.choose(logits)
    weights = torch.zeros(N, E, dtype=x.dtype).scatter(1, routing.indices, routing.weights.double())
    stacks = {name: p.detach() for name, p in block.experts.named_parameters()}

    def loss(copies: dict[str, Tensor], shift: Tensor) -> Tensor:
        if "proj" in copies:
            y = torch.einsum("neoi,ni->neo", copies["proj"], x)
        else:
            gate, up = torch.einsum("neoi,ni->neo", copies["gate_up_proj"], x).chunk(2, -1)
            y = torch.einsum("neoi,nei->neo", copies["down_proj"], silu(gate) * up)
        mixed = ((y + shift) * weights[:, :, None]).sum(1)
        return (mixed - target).square().sum()

    copies = {name: p.expand(N, *p.shape) for name, p in stacks.items()}
    shift = torch.zeros(N, E, D, dtype=x.dtype)
    by_weight, by_output = grad(loss, argnums=(0, 1))(copies, shift)
    squares = [g.flatten(2).square().sum(-1) for g in by_weight.values()]
    return by_output.norm(dim=-1).detach(), torch.stack(squares).sum(0).sqrt().detach()


@pytest.mark.parametrize("top_k", [1, K, E])
@pytest.mark.parametrize("width", [None, W])
def test_importance_and_cost_are_those_of_each_token(width: int | None, top_k: int) -> None:
    block = make_block(width, top_k)
    x, target = torch.randn(2, N, D, dtype=torch.float64)
    shaper = SurpriseShaper()
    sites = find_sites(block)
    shaper.attach(block, sites)
    main = (block(x) - target).square().sum()
    routes = Routes(sites, [block.router(x)], Adam(block.parameters()), None, main)
    (found,) = shaper.surprise(routes)
    importance, cost = by_token(block, x, target)
    torch.testing.assert_close(found.importance.double(), importance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.cost.double(), cost, rtol=1e-4, atol=1e-6)
    assert (found.cost > 0).sum() == N * top_k


def test_the_loss_is_the_entropy_of_what_goodness_leaves() -> None:
    block = make_block(W)
    x, target = torch.randn(2, N, D, dtype=torch.float64)
    shaper = RoutingShaper(block, "sars", w_meta=1.0)
    logits = block.router(x)
    main = (block(x) - target).square().sum()
    found = shaper.calculate_meta_loss([logits], Adam(block.parameters()), None, main)
    a, s = by_token(block, x, target)
    b = logits.detach()
    a, s, b = (v / v.abs().amax(-1, keepdim=True) for v in (a, s, b))
    p = (logits - a * (b - s)).softmax(-1)
    expected = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    grads = [
        torch.autograd.grad(x, block.router.weight, retain_graph=True)[0] for x in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_heads_are_seen_too_and_the_main_gradient_stays() -> None:
    torch.manual_seed(0)
    model = TinyOnnForCausalLM(
        TinyOnnConfig(hidden_size=32, num_hidden_layers=2, num_symmetries=0, num_experts=4)
    )
    tokens = torch.randint(0, 10, (2, 9))

    def gradient(shaper: RoutingShaper | None) -> Tensor:
        model.zero_grad()
        out = model(input_ids=tokens, labels=tokens, output_router_logits=True)
        if shaper is not None:
            meta = shaper.calculate_meta_loss(
                out.router_logits, Adam(model.parameters()), None, out.loss
            )
            assert meta.item() > 0
        out.loss.backward()
        return model.model.layers[0].self_attn.heads.experts.q_proj.grad

    plain = gradient(None)
    shaper = RoutingShaper(model, "sars")
    torch.testing.assert_close(gradient(shaper), plain)
    with torch.no_grad():
        model(input_ids=tokens)
    with pytest.raises(ValueError, match="sars needs a forward with gradients"):
        out = model(input_ids=tokens, labels=tokens, output_router_logits=True)
        shaper.strategies["sars"]._calls.clear()
        shaper.calculate_meta_loss(out.router_logits, Adam(model.parameters()), None, out.loss)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sars must see inside the experts\. .*experts"):
        shape_routing(make_model("mixtral"), strategy="sars")
    with pytest.raises(ValueError, match="bias moves TinyOnn's own choice"):
        shape_routing(make_model("mixtral"), strategy="bias")
    block = nn.Sequential(make_block(W))
    shaper = RoutingShaper(block, "sars")
    with pytest.raises(ValueError, match="give calculate_meta_loss one"):
        shaper.calculate_meta_loss([torch.zeros(N, E)], Adam(block.parameters()))
