"""FARS: the formula by hand, the gradient it sends, and when its costs are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import FisherShaper, RoutingShaper, fisher_cost
from tiny_onn.shaping import priced_entropy as term_module
from tiny_onn.shaping.moments import MeanRoots, second_moments
from tiny_onn.shaping.priced_entropy import priced_entropy
from tiny_onn.shaping.sites import Site, find_sites

D, E = 4, 3


def make_model(sites: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            MixtureOfExperts(
                LinearRouter(D, E), GroupedExperts(E, D, intermediate_size=4), num_experts_per_tok=2
            )
            for _ in range(sites)
        )
    )


def set_moments(model: nn.Module, optimizer: Optimizer, per_expert: list[float]) -> None:
    """Pretend that expert e's weights all have the second moment ``per_expert[e]``."""
    for site in find_sites(model):
        for parameter in site.parameters.values():
            v = torch.tensor(per_expert).view(-1, 1, 1).expand_as(parameter).clone()
            optimizer.state[parameter] = {"exp_avg_sq": v, "step": torch.tensor(1.0)}


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    x = torch.randn(32, D)
    F.mse_loss(model(x), x.roll(1, -1)).backward()
    optimizer.step()


def by_hand(logits: list[list[float]], cost: list[float], w_entropy: float, alpha: float) -> float:
    """The mean over tokens of ``w_entropy * H(p) + alpha * sum_e p_e c_e``."""
    total = 0.0
    for row in logits:
        exp = [math.exp(value) for value in row]
        p = [value / sum(exp) for value in exp]
        entropy = -sum(share * math.log(share) for share in p)
        price = sum(share * c for share, c in zip(p, cost, strict=True))
        total += w_entropy * entropy + alpha * price
    return total / len(logits)


def test_the_cost_by_hand() -> None:
    up = torch.tensor([[[1.0, 4.0]], [[9.0, 1.0]]])  # roots 1, 2 and 3, 1
    down = torch.tensor([[[16.0], [0.0]], [[4.0], [25.0]]])  # roots 4, 0 and 2, 5
    # The mean over an expert's four entries is 7/4 and 11/4; over the experts, 9/4.
    expected = torch.tensor([7 / 9, 11 / 9])
    torch.testing.assert_close(fisher_cost([up, down]), expected)
    # A factor of v, such as a bias correction, cancels.
    torch.testing.assert_close(fisher_cost([1e-9 * up, 1e-9 * down]), expected)
    assert fisher_cost([torch.zeros(2, 3, 3)]).tolist() == [1.0, 1.0]
    assert fisher_cost([torch.ones(2, 3, 3).bfloat16()]).dtype == torch.float32


@pytest.mark.parametrize(("w_entropy", "alpha"), [(1.0, 0.1), (0.0, 0.5), (0.3, 2.0)])
def test_the_term_by_hand_with_padding(w_entropy: float, alpha: float) -> None:
    model = make_model(sites=2)
    optimizer = Adam(model.parameters())
    set_moments(model, optimizer, [4.0, 1.0, 9.0])  # roots 2, 1, 3, over their mean of 2
    cost = [1.0, 0.5, 1.5]
    first = [[0.2, -1.0, 0.5], [2.0, 0.0, 0.0], [7.0, -7.0, 3.0]]
    second = [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.3], [5.0, 5.0, 5.0]]
    routing = [torch.tensor(first), torch.tensor(second)]
    shaper = RoutingShaper(model, "fars", w_meta=0.1, w_entropy=w_entropy, cost_alpha=alpha)

    def expected(rows: slice) -> float:
        terms = [by_hand(site[rows], cost, w_entropy, alpha) for site in (first, second)]
        return 0.1 * sum(terms) / 2

    assert shaper.calculate_meta_loss(routing, optimizer).item() == pytest.approx(
        expected(slice(None)), rel=1e-5
    )
    for mask in (torch.tensor([True, True, False]), torch.tensor([[1, 1, 0]])):
        masked = shaper.calculate_meta_loss(routing, optimizer, mask)
        assert masked.item() == pytest.approx(expected(slice(2)), rel=1e-5)


def test_the_routers_gradient_changes_with_one_experts_second_moment() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    logits = torch.randn(16, E, requires_grad=True)

    def gradient(moments: list[float]) -> Tensor:
        set_moments(model, optimizer, moments)
        loss = RoutingShaper(model).calculate_meta_loss([logits], optimizer)
        return torch.autograd.grad(loss, logits)[0]

    even, skewed = gradient([1.0, 1.0, 1.0]), gradient([1.0, 100.0, 1.0])
    # Descending makes the expensive expert less likely for every token, the others more.
    assert (skewed[:, 1] > even[:, 1]).all()
    assert (skewed[:, [0, 2]] < even[:, [0, 2]]).all()


def test_equal_costs_leave_the_entropy_term_and_a_constant() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    set_moments(model, optimizer, [0.3, 0.3, 0.3])
    logits = torch.randn(16, E, requires_grad=True)
    loss = RoutingShaper(model, w_meta=1.0, cost_alpha=0.7).calculate_meta_loss([logits], optimizer)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item() + 0.7, rel=1e-5)
    found, expected = (torch.autograd.grad(term, logits)[0] for term in (loss, entropy))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_costly_expert_is_used_less_after_a_few_steps() -> None:
    x = torch.randn(64, D)

    def share_of_expert_1(moment: float) -> float:
        model = make_model()
        optimizer = Adam(model.parameters())
        set_moments(model, optimizer, [1.0, moment, 1.0])
        shaper = RoutingShaper(model, w_entropy=0.0, cost_alpha=1.0)
        router = LinearRouter(D, E)
        router_optimizer = SGD(router.parameters(), lr=10.0)
        for _ in range(10):
            router_optimizer.zero_grad()
            shaper.calculate_meta_loss([router(x)], optimizer).backward()
            router_optimizer.step()
        return router(x).softmax(-1)[:, 1].mean().item()

    assert share_of_expert_1(100.0) < share_of_expert_1(1.0) - 0.05
    assert share_of_expert_1(1.0) < share_of_expert_1(0.01)


def test_costs_carry_no_gradient_and_change_nothing() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    step(model, optimizer)
    before = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()}
    shaper = FisherShaper()
    costs = shaper.costs(find_sites(model), optimizer)
    assert not any(cost.requires_grad for cost in costs)
    assert costs[0].mean().item() == pytest.approx(1.0, rel=1e-5)
    assert costs[0].std() > 1e-3
    for p, v in before.items():
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], v)


@pytest.mark.parametrize("sites", [1, 3])
def test_costs_are_computed_once_an_update(sites: int) -> None:
    model = make_model(sites)
    optimizer = AdamW(model.parameters())
    shaper = RoutingShaper(model)
    routing = [torch.randn(8, E) for _ in range(sites)]
    step(model, optimizer)
    read = MeanRoots.__call__
    with mock.patch.object(MeanRoots, "__call__", autospec=True, side_effect=read) as counted:
        values = {shaper.calculate_meta_loss(routing, optimizer).item() for _ in range(4)}
        assert counted.call_count == 1
        step(model, optimizer)
        fresh = shaper.calculate_meta_loss(routing, optimizer).item()
        shaper.calculate_meta_loss(routing, optimizer)
        assert counted.call_count == 2
    assert len(values) == 1 and fresh not in values
    assert fresh == RoutingShaper(model).calculate_meta_loss(routing, optimizer).item()


def test_costs_are_read_again_when_a_state_is_loaded() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    shaper = FisherShaper()
    step(model, optimizer)
    saved = optimizer.state_dict()
    stale = shaper.costs(find_sites(model), optimizer)[0]
    for kept in saved["state"].values():
        kept["exp_avg_sq"] = kept["exp_avg_sq"] ** 2
    optimizer.load_state_dict(saved)
    assert not torch.allclose(shaper.costs(find_sites(model), optimizer)[0], stale)


def test_another_optimizer_is_another_source_of_costs() -> None:
    model = make_model()
    first, second = Adam(model.parameters()), Adam(model.parameters())
    set_moments(model, first, [4.0, 1.0, 9.0])
    shaper = FisherShaper()
    sites = find_sites(model)
    assert shaper.costs(sites, first)[0].tolist() == [1.0, 0.5, 1.5]
    assert shaper.costs(sites, second)[0].tolist() == [1.0, 1.0, 1.0]


def test_before_the_first_update_every_cost_is_one() -> None:
    model = make_model()
    costs = FisherShaper().costs(find_sites(model), Adam(model.parameters()))
    assert costs[0].tolist() == [1.0] * E


def test_a_second_moment_that_is_missing_is_named() -> None:
    model = make_model(sites=2)
    site = find_sites(model)[1]
    rest = [p for p in model.parameters() if p is not site.parameters["1.experts.down_proj"]]
    optimizer = Adam(rest)
    shaper = FisherShaper()
    assert shaper.costs(find_sites(model), optimizer)[1].tolist() == [1.0] * E
    with pytest.raises(ValueError, match=r"Adam holds no second moment of 1\.experts\.down_proj"):
        step(model, optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_refused_once_it_has_been_stepped(momentum: float) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=momentum)
    shaper = RoutingShaper(model)
    shaper.calculate_meta_loss([torch.randn(8, E)], optimizer)
    with pytest.raises(ValueError, match="SGD keeps no second moment .* Adam family"):
        step(model, optimizer)


def _ars2(model: nn.Module) -> Optimizer:
    return ARS2Neo(param_groups(model), lr=1e-3)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda model: Adam(model.parameters()),
    "adamw foreach": lambda model: AdamW(model.parameters(), foreach=True),
    "adamw fused": lambda model: AdamW(model.parameters(), fused=True),
    "adamw amsgrad": lambda model: AdamW(model.parameters(), amsgrad=True),
    "nadam": lambda model: NAdam(model.parameters()),
    "ars2-neo": _ars2,
}


def _plain_cost(site: Site, optimizer: Optimizer) -> list[float]:
    sums = [0.0] * site.num_experts
    entries = 0
    for parameter in site.parameters.values():
        v = optimizer.state[parameter]["exp_avg_sq"].double()
        entries += v[0].numel()
        for e in range(site.num_experts):
            sums[e] += sum(math.sqrt(value) for value in v[e].flatten().tolist())
    means = [total / entries for total in sums]
    return [mean / (sum(means) / len(means)) for mean in means]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_the_adam_family_will_do(name: str) -> None:
    model = make_model(sites=2)
    optimizer = OPTIMIZERS[name](model)
    shaper = FisherShaper()
    sites = find_sites(model)
    assert all(cost.tolist() == [1.0] * E for cost in shaper.costs(sites, optimizer))
    for _ in range(2):
        step(model, optimizer)
    for site, cost in zip(sites, shaper.costs(sites, optimizer), strict=True):
        assert cost.tolist() == pytest.approx(_plain_cost(site, optimizer), rel=1e-5)


def test_second_moments_are_the_optimizers_own_tensors() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    (site,) = find_sites(model)
    assert second_moments(site, optimizer) is None
    step(model, optimizer)
    found = second_moments(site, optimizer)
    assert found is not None
    for v, parameter in zip(found, site.parameters.values(), strict=True):
        assert v is optimizer.state[parameter]["exp_avg_sq"]


@pytest.mark.parametrize("kept", [{"state1": 1, "state2": 2}, {"exp_avg_sq": nn.Parameter()}])
def test_second_moments_in_eight_bits_are_refused(kept: dict[str, object]) -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = kept
    with pytest.raises(ValueError, match="Adam keeps (its|the) second moment"):
        second_moments(find_sites(model)[0], optimizer)


def test_a_sample_of_the_entries_gives_the_cost() -> None:
    torch.manual_seed(0)
    # Columns and rows of very different size, as weights have them.
    rows, columns = torch.rand(1, 512, 1).exp(), torch.rand(1, 1, 256).exp()
    sizes = torch.tensor([1.0, 2.0, 0.5, 0.1]).view(-1, 1, 1)
    moments = [torch.rand(4, 512, 256) * rows * columns * sizes, torch.rand(4, 256, 256) * sizes]
    read, all_of_them = (fisher_cost(moments, samples) for samples in (4096, None))
    torch.testing.assert_close(read, all_of_them, rtol=0.02, atol=0)
    assert not torch.equal(read, all_of_them)
    assert torch.equal(fisher_cost(moments, 10**9), all_of_them)


def test_the_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(7, E, requires_grad=True) for _ in range(2)]
    model = make_model(sites=2)
    optimizer = Adam(model.parameters())
    set_moments(model, optimizer, [4.0, 1.0, 9.0])
    shaper = RoutingShaper(model, w_meta=0.7, w_entropy=0.3, cost_alpha=2.0)
    found = torch.autograd.grad(3 * shaper.calculate_meta_loss(logits, optimizer), logits)
    cost = torch.tensor([1.0, 0.5, 1.5])
    p = [x.softmax(-1) for x in logits]
    terms = [(0.3 * -(q * q.log()).sum(-1) + 2.0 * (q * cost).sum(-1)).mean() for q in p]
    expected = torch.autograd.grad(3 * 0.7 * torch.stack(terms).mean(), logits)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def formula(logits: Sequence[Tensor], prices: Sequence[Tensor], w: float, kept: Tensor) -> Tensor:
    terms = []
    for logits_NE, price_E in zip(logits, prices, strict=True):
        p = logits_NE.float()[kept].softmax(-1)
        terms.append((p * (price_E - w * p.log())).sum(-1).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("order", ["together", "main first", "main last", "twice", "alone"])
@pytest.mark.parametrize("experts", [[3, 3], [3, 20]])
def test_the_gradient_is_added_to_that_of_all_else(
    experts: list[int], order: str, masked: bool
) -> None:
    x = torch.randn(10, D)
    weights = [torch.randn(e, D, requires_grad=True) for e in experts]
    prices = [torch.rand(e) for e in experts]
    kept = torch.tensor([0, 1, 4, 5, 9]) if masked else torch.arange(10)

    def gradients(own: bool) -> list[Tensor]:
        logits = [x @ weight.t() for weight in weights]
        main = torch.stack([(logits_NE.softmax(-1) ** 3).sum() for logits_NE in logits]).sum()
        if own:
            term = priced_entropy(logits, prices, 0.7, kept if masked else None)
        else:
            term = formula(logits, prices, 0.7, kept)
        parts = {
            "together": [3.0 * term + main],
            "main first": [main, 3.0 * term],
            "main last": [3.0 * term, main],
            "twice": [main + term, 2.0 * term],
            "alone": [3.0 * term],
        }
        for part in parts[order]:
            part.backward(retain_graph=True)
        found = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            weight.grad = None
        return found

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_has_the_dtype_of_its_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(6, E).to(dtype).requires_grad_()
    priced_entropy([logits], [torch.rand(E)], 1.0).backward()
    assert logits.grad is not None and logits.grad.dtype == dtype and logits.grad.any()


def test_no_gradient_is_computed_before_its_time() -> None:
    """Though the routing loss comes last, and so is first in the backward pass."""
    events = []
    leaf = torch.randn(6, E, requires_grad=True)
    logits = 2 * leaf
    later = logits.softmax(-1)
    later.register_hook(lambda grad: events.append("later"))
    loss = (later**2).sum() + priced_entropy([logits], [torch.rand(E)], 1.0)
    compute = term_module._gradient

    def watched(*args: Any) -> Tensor:
        events.append("own")
        return compute(*args)

    with mock.patch.object(term_module, "_gradient", watched):
        loss.backward()
    assert events == ["later", "own"]


def test_auto_makes_the_cost_a_share_of_the_main_loss_and_then_freezes_it() -> None:
    model = make_model(sites=2)
    optimizer = Adam(model.parameters())
    shaper = RoutingShaper(model, cost_alpha="auto", share=0.05, auto_updates=3, w_entropy=0.0)
    routing = [torch.randn(8, E) for _ in range(2)]
    with pytest.raises(ValueError, match="cost_alpha.*main loss"):
        shaper.calculate_meta_loss(routing, optimizer)
    main = torch.tensor(2.0)
    for _ in range(3):
        loss = shaper.calculate_meta_loss(routing, optimizer, main_loss=main)
        assert loss.item() == pytest.approx(0.05 * 2.0, rel=0.05)
        step(model, optimizer)
    kept = shaper.state_dict()["fars"]
    assert shaper.diagnostics == {"cost_alpha": kept["cost_alpha"]}
    assert kept["updates_left"] == 0
    shaper.calculate_meta_loss(routing, optimizer, main_loss=100 * main)
    assert shaper.state_dict()["fars"] == kept
    again = RoutingShaper(model, cost_alpha="auto", w_entropy=0.0)
    again.load_state_dict(shaper.state_dict())
    torch.testing.assert_close(
        again.calculate_meta_loss(routing, optimizer),
        shaper.calculate_meta_loss(routing, optimizer),
    )


def test_costs_over_load_charge_what_a_token_costs() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    set_moments(model, optimizer, [4.0, 1.0, 1.0])
    shaper = RoutingShaper(model, w_meta=1.0, w_entropy=0.0, cost_alpha=1.0, per_load=True)
    # Every token takes expert 0; the other place is shared by 1 and 2: loads 1.5, 0.75, 0.75.
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 0.0, 1.0]])
    ratio = torch.tensor([2 / 1.5, 1 / 0.75, 1 / 0.75])
    expected = (logits.softmax(-1) * ratio / ratio.mean()).sum(-1).mean()
    torch.testing.assert_close(shaper.calculate_meta_loss([logits], optimizer), expected)
    assert shaper.state_dict()["fars"]["loads"]["0.experts"] == pytest.approx([1.5, 0.75, 0.75])
