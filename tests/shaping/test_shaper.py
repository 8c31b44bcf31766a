"""The shaper: its sites, its weight, its registry, its mask, and the balance loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import SHAPERS, LoadBalanceShaper, RoutingShaper
from tiny_onn.shaping.sites import Routes, find_sites

D = 4


class Block(nn.Module):
    """Two sites of different sizes, declared in the order they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = (LinearRouter(D, 3), LinearRouter(D, 5))
        self.first = MixtureOfExperts(self.routers[0], GroupedExperts(3, D), 1)
        self.norm = nn.LayerNorm(D)
        self.second = MixtureOfExperts(self.routers[1], GroupedExperts(5, D, None, 4), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block()


def routing_of(model: Block, x: Tensor) -> list[Tensor]:
    first = model.routers[0](x)
    return [first, model.routers[1](model.norm(model.first(x)))]


def shaping_loss(
    model: Block, shaper: RoutingShaper, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The loss as in a training step: after a forward, with the main loss at hand."""
    seen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda *call: seen.append(call[2])) for router in model.routers
    ]
    out = model(x)
    for hook in hooks:
        hook.remove()
    per_token = out.square().sum(-1)
    main = (per_token if mask is None else per_token[mask.reshape(-1)]).sum()
    return shaper.calculate_meta_loss(seen, Adam(model.parameters()), mask, main)


def test_sites_are_linked_by_object(model: Block) -> None:
    first, second = find_sites(nn.Sequential(model))
    assert (first.name, first.num_experts, first.num_experts_per_tok) == ("0.first.experts", 3, 1)
    assert (second.name, second.num_experts, second.num_experts_per_tok) == (
        "0.second.experts",
        5,
        2,
    )
    assert list(first.parameters) == ["0.first.experts.proj"]
    assert first.parameters["0.first.experts.proj"] is model.first.experts.proj
    assert list(second.parameters) == [
        "0.second.experts.gate_up_proj",
        "0.second.experts.down_proj",
    ]


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MixtureOfExperts"):
        RoutingShaper(nn.Linear(2, 2))


@pytest.mark.parametrize("name", [*SHAPERS, "fars+z", "balance+bias"])
def test_every_shaper_gives_a_scalar_weighted_by_w_meta(model: Block, name: str) -> None:
    x = torch.randn(16, D)
    losses = [shaping_loss(model, RoutingShaper(model, name, w_meta=w), x) for w in (0.1, 0.3)]
    assert losses[0].ndim == 0
    assert losses[1].item() == pytest.approx(3 * losses[0].item(), rel=1e-5)
    if name in ("none", "bias"):
        assert losses[0].item() == 0
        return
    assert losses[0].item() > 0
    losses[0].backward()
    for router in model.routers:
        assert router.weight.grad is not None and router.weight.grad.any()


def test_strategies_add_up_by_their_weights(model: Block) -> None:
    x = torch.randn(16, D)
    fars, z = (shaping_loss(model, RoutingShaper(model, name), x) for name in ("fars", "z"))
    both = RoutingShaper(model, "fars+z", weights={"z": 0.01})
    torch.testing.assert_close(shaping_loss(model, both, x), fars + 0.01 * z)
    with pytest.raises(ValueError, match="weights must be of the strategies fars, z. Got balance"):
        RoutingShaper(model, "fars+z", weights={"balance": 1.0})
    with pytest.raises(ValueError, match="The strategy balance has no option cost_alpha"):
        RoutingShaper(model, "balance", cost_alpha=0.1)


def test_layers_that_are_computed_twice_are_shaped_twice(model: Block) -> None:
    x = torch.randn(16, D)
    routing, optimizer = routing_of(model, x), Adam(model.parameters())
    shaper = RoutingShaper(model)
    other = [logits + torch.randn_like(logits) for logits in routing]
    once, again = (shaper.calculate_meta_loss(r, optimizer) for r in (routing, other))
    both = shaper.calculate_meta_loss([*routing, *other], optimizer)
    torch.testing.assert_close(both, (once + again) / 2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_number_of_sites_must_fit(model: Block, count: int) -> None:
    shaper = RoutingShaper(model)
    with pytest.raises(ValueError, match=f"Expected the logits of 2 sites. Got {count}"):
        shaper.calculate_meta_loss([torch.zeros(4, 3)] * count, Adam(model.parameters()))


def test_an_unknown_strategy_is_refused(model: Block) -> None:
    with pytest.raises(ValueError, match=r"strategy must be one of none, .*fars.* Got 'farce'"):
        RoutingShaper(model, "farce")


def test_a_strategy_of_ones_own(model: Block) -> None:
    class Spread:
        def loss(self, routes: Routes) -> Tensor:
            return torch.stack([logits_NE.var() for logits_NE in routes.logits]).sum()

    routing = [torch.randn(6, 3), torch.randn(6, 5)]
    loss = RoutingShaper(model, Spread(), w_meta=2.0).calculate_meta_loss(
        routing, Adam(model.parameters())
    )
    assert loss.item() == pytest.approx(2 * (routing[0].var() + routing[1].var()).item())


@pytest.mark.parametrize("name", [name for name in SHAPERS if name != "none"])
def test_padding_does_not_count(model: Block, name: str) -> None:
    shaper = RoutingShaper(model, name)
    x = torch.randn(12, D)
    mask = torch.rand(3, 4) > 0.5
    garbled = torch.where(mask.reshape(-1, 1), x, 5 * torch.randn_like(x))
    found = shaping_loss(model, shaper, garbled, mask)
    torch.testing.assert_close(found, shaping_loss(model, shaper, x[mask.reshape(-1)]))
    everything = shaping_loss(model, shaper, x, torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(everything, shaping_loss(model, shaper, x))
    assert shaping_loss(model, shaper, x, torch.zeros(3, 4, dtype=torch.bool)).item() == 0


def test_a_mask_of_another_size_is_refused(model: Block) -> None:
    routing = [torch.randn(12, 3), torch.randn(12, 5)]
    with pytest.raises(ValueError, match="mask must have 12 entries, one a token. Got 11"):
        RoutingShaper(model).calculate_meta_loss(routing, Adam(model.parameters()), torch.ones(11))


def test_the_balance_shaper_uses_each_sites_own_top_k(model: Block) -> None:
    sites = find_sites(model)
    even = [torch.stack([torch.arange(float(n)).roll(s) for s in range(n)]) for n in (3, 5)]
    loss = LoadBalanceShaper().loss(Routes(sites, even, Adam(model.parameters())))
    # K when even: 1 at the first site, 2 at the second.
    assert loss.item() == pytest.approx((1 + 2) / 2, rel=1e-5)


def test_descending_the_balance_loss_evens_the_load(model: Block) -> None:
    optimizer = Adam(model.parameters())
    shaper = RoutingShaper(model, "balance", w_meta=1.0)
    x = torch.randn(256, D) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    router_optimizer = Adam([router.weight for router in model.routers], lr=0.05)

    def top_share() -> float:
        chosen = model.routers[0](x).argmax(-1)
        return F.one_hot(chosen, 3).float().mean(0).max().item()

    before = top_share()
    for _ in range(40):
        router_optimizer.zero_grad()
        shaper.calculate_meta_loss(routing_of(model, x), optimizer).backward()
        router_optimizer.step()
    assert before > 0.6 > 0.5 > top_share()


def test_the_selection_bias_moves_towards_an_even_load(model: Block) -> None:
    shaper = RoutingShaper(model, "bias", rate=0.05)
    optimizer = Adam(model.parameters())
    routing = [torch.randn(400, n) + torch.linspace(1, -1, n) for n in (3, 5)]

    def top_shares() -> list[float]:
        chosen = [
            site.block.choose(logits).indices
            for site, logits in zip(shaper.sites, routing, strict=True)
        ]
        return [torch.bincount(c.flatten()).max().item() / c.numel() for c in chosen]

    before = top_shares()
    weights = model.first.choose(routing[0]).weights
    assert not shaper.calculate_meta_loss(routing, optimizer).requires_grad
    optimizer.step()
    assert model.first.selection_bias.tolist() == pytest.approx([-0.05, 0.05, 0.05])
    for _ in range(60):
        shaper.calculate_meta_loss(routing, optimizer)
        optimizer.step()
    assert before[0] > 0.6 and before[1] > 0.3
    assert top_shares() == pytest.approx([1 / 3, 1 / 5], abs=0.05)
    # The bias decides who is chosen; the weights are those of the raw logits.
    moved = model.first.choose(routing[0])
    assert torch.equal(moved.weights, weights) and not torch.equal(
        moved.indices, routing[0].topk(1).indices
    )
    assert "first.selection_bias" in model.state_dict()
