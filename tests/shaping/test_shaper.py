"""The shaper: its sites, its weight, its registry, its mask, and the balance loss."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import SHAPERS, LoadBalanceShaper, RoutingShaper
from tiny_onn.shaping.sites import Site, find_sites

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


def test_sites_are_linked_by_object(model: Block) -> None:
    first, second = find_sites(nn.Sequential(model))
    assert (first.name, first.num_experts, first.num_experts_per_tok) == ("0.first", 3, 1)
    assert (second.name, second.num_experts, second.num_experts_per_tok) == ("0.second", 5, 2)
    assert list(first.parameters) == ["0.first.experts.proj"]
    assert first.parameters["0.first.experts.proj"] is model.first.experts.proj
    assert list(second.parameters) == [
        "0.second.experts.gate_up_proj",
        "0.second.experts.down_proj",
    ]


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MixtureOfExperts"):
        RoutingShaper(nn.Linear(2, 2))


@pytest.mark.parametrize("name", SHAPERS)
def test_every_shaper_gives_a_scalar_weighted_by_w_meta(model: Block, name: str) -> None:
    optimizer = Adam(model.parameters())
    x = torch.randn(16, D)
    losses = [
        RoutingShaper(model, name, w_meta=w).calculate_meta_loss(routing_of(model, x), optimizer)
        for w in (0.1, 0.3)
    ]
    assert losses[0].ndim == 0
    assert losses[1].item() == pytest.approx(3 * losses[0].item(), rel=1e-5)
    if name == "none":
        assert losses[0].item() == 0
        return
    assert losses[0].item() > 0
    losses[0].backward()
    for router in model.routers:
        assert router.weight.grad is not None and router.weight.grad.any()


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
        def loss(
            self, sites: Sequence[Site], logits: Sequence[Tensor], optimizer: Optimizer
        ) -> Tensor:
            return torch.stack([site_logits.var() for site_logits in logits]).sum()

    routing = [torch.randn(6, 3), torch.randn(6, 5)]
    loss = RoutingShaper(model, Spread(), w_meta=2.0).calculate_meta_loss(
        routing, Adam(model.parameters())
    )
    assert loss.item() == pytest.approx(2 * (routing[0].var() + routing[1].var()).item())


@pytest.mark.parametrize("name", [name for name in SHAPERS if name != "none"])
def test_padding_does_not_count(model: Block, name: str) -> None:
    optimizer = Adam(model.parameters())
    shaper = RoutingShaper(model, name)
    routing = [torch.randn(12, 3), torch.randn(12, 5)]
    mask = torch.rand(3, 4) > 0.5
    garbled = [
        torch.where(mask.reshape(-1, 1), site, 50 * torch.randn_like(site)) for site in routing
    ]
    found = shaper.calculate_meta_loss(garbled, optimizer, mask)
    kept = [site[mask.reshape(-1)] for site in routing]
    torch.testing.assert_close(found, shaper.calculate_meta_loss(kept, optimizer))
    everything = shaper.calculate_meta_loss(routing, optimizer, torch.ones(3, 4))
    torch.testing.assert_close(everything, shaper.calculate_meta_loss(routing, optimizer))
    nothing = shaper.calculate_meta_loss(routing, optimizer, torch.zeros(3, 4))
    assert nothing.item() == 0


def test_a_mask_of_another_size_is_refused(model: Block) -> None:
    routing = [torch.randn(12, 3), torch.randn(12, 5)]
    with pytest.raises(ValueError, match="mask must have 12 entries, one a token. Got 11"):
        RoutingShaper(model).calculate_meta_loss(routing, Adam(model.parameters()), torch.ones(11))


def test_the_balance_shaper_uses_each_sites_own_top_k(model: Block) -> None:
    sites = find_sites(model)
    even = [torch.stack([torch.arange(float(n)).roll(s) for s in range(n)]) for n in (3, 5)]
    loss = LoadBalanceShaper().loss(sites, even, Adam(model.parameters()))
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
