"""Shaping of models that aren't ours: sites, raw logits, gradients, and what is left behind."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from moe_models import (
    MODELS,
    D,
    E,
    K,
    checkpoint,
    gradients,
    make_model,
    make_tokens,
    raw_logits,
    routed,
    router_inputs,
)
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.shaping import ExpertSite, RoutingShaper, find_expert_sites, shape_routing

architectures = pytest.mark.parametrize("name", MODELS)


def set_moments(model: nn.Module, optimizer: Optimizer, per_expert: list[float]) -> None:
    """Pretend that expert e's parameters all have the second moment ``per_expert[e]``."""
    for _, experts in routed(model):
        for p in experts.parameters():
            v = torch.tensor(per_expert).view(-1, *[1] * (p.ndim - 1)).expand_as(p).clone()
            optimizer.state[p] = {"exp_avg_sq": v, "step": torch.tensor(1.0)}


@architectures
def test_sites_are_linked_by_object(name: str) -> None:
    model = make_model(name)
    found = find_expert_sites(model)
    assert [(site.router, site.experts) for site in found] == routed(model)
    assert all(site.num_experts_per_tok == K for site in found)
    for site, (_, experts) in zip(shape_routing(model).shaper.sites, routed(model), strict=True):
        assert site.num_experts == E
        assert list(map(id, site.parameters.values())) == list(map(id, experts.parameters()))
        assert all(dict(model.named_parameters())[key] is p for key, p in site.parameters.items())


@architectures
def test_logits_are_raw(name: str) -> None:
    model = make_model(name)
    shaping = shape_routing(model)
    for _ in range(2):  # the first call is the one that looks where they stand
        with router_inputs(model) as inputs:
            model(input_ids=make_tokens())
        logits = shaping.logits()
        assert len(logits) == len(inputs)
        for (router, _), x, found in zip(routed(model), inputs, logits, strict=True):
            assert found.shape == (12, E) and found.requires_grad
            torch.testing.assert_close(found, raw_logits(router, x))


@architectures
def test_the_gradient_reaches_every_router_and_no_expert(name: str) -> None:
    model = make_model(name)
    optimizer = AdamW(model.parameters())
    set_moments(model, optimizer, [1.0, 9.0, 4.0, 1.0])
    shaping = shape_routing(model, optimizer)
    model(input_ids=make_tokens())
    shaping.loss().backward()
    assert all(
        p.grad is not None and p.grad.any() for r, _ in routed(model) for p in r.parameters()
    )
    # Experts move the logits of later sites; what they do to their own site's loss is nothing.
    assert all(p.grad is None for p in routed(model)[-1][1].parameters())


@architectures
def test_a_costly_expert_is_used_less_after_a_few_steps(name: str) -> None:
    model = make_model(name)
    optimizer = AdamW(model.parameters())
    set_moments(model, optimizer, [1.0, 100.0, 1.0, 1.0])
    shaping = shape_routing(model, optimizer, w_meta=1.0, w_entropy=0.0, cost_alpha=1.0)
    routers = Adam([p for router, _ in routed(model) for p in router.parameters()], lr=0.05)
    tokens = make_tokens(4, 8)

    def share_of_expert_1() -> Tensor:
        model(input_ids=tokens)
        return torch.stack([site.softmax(-1)[:, 1].mean() for site in shaping.logits()])

    before = share_of_expert_1()
    for _ in range(8):
        routers.zero_grad()
        model(input_ids=tokens)
        shaping.loss().backward()
        routers.step()
    assert (share_of_expert_1() < before - 0.02).all()


@architectures
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = make_model(name)
    optimizer = AdamW(model.parameters())
    set_moments(model, optimizer, [1.0, 9.0, 4.0, 1.0])
    shaping = shape_routing(model, optimizer, w_meta=1.0)
    tokens, mask = make_tokens(), torch.ones(2, 6)
    mask[1, 4:] = 0

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        main = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        (main + shaping.loss(mask)).backward()
        with pytest.raises(ValueError, match="no router logits"):
            shaping.logits()
        return gradients(model)

    plain = step()
    checkpoint(model)
    again = step()
    assert plain.keys() == again.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-4, atol=1e-6, msg=key)


def test_reentrant_checkpointing_is_refused() -> None:
    model = make_model("qwen3_moe")
    shaping = shape_routing(model, AdamW(model.parameters()))
    checkpoint(model, use_reentrant=True)
    model(input_ids=make_tokens(), use_cache=False)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        shaping.loss()


@architectures
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    model = make_model(name)
    shaping = shape_routing(model, AdamW(model.parameters()))
    tokens = make_tokens(4)
    model(input_ids=tokens)
    shaping.loss().backward()
    whole = gradients(model)
    model.zero_grad()
    for part in tokens.chunk(2):
        model(input_ids=part)
        (shaping.loss() / 2).backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, whole[key], rtol=1e-4, atol=1e-7, msg=key)


@architectures
def test_bfloat16_autocast(name: str) -> None:
    model = make_model(name)
    shaping = shape_routing(model, AdamW(model.parameters()))
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16), router_inputs(model) as inputs:
        main = model(input_ids=tokens, labels=tokens).loss
    logits = shaping.logits()
    for (router, _), x, found in zip(routed(model), inputs, logits, strict=True):
        assert found.dtype == torch.float32
        # bfloat16 has 8 bits: products of order one are off by some hundredths.
        torch.testing.assert_close(found, raw_logits(router, x.float()), rtol=0.02, atol=0.05)
    loss = shaping.loss()
    assert loss.dtype == torch.float32
    (main + loss).backward()
    assert all(p.grad.isfinite().all() for r, _ in routed(model) for p in r.parameters())


@architectures
@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_nothing_behind(name: str, training: bool) -> None:
    model = make_model(name)
    shaping = shape_routing(model, AdamW(model.parameters()))
    tokens = make_tokens()
    model(input_ids=tokens)
    kept = weakref.ref(shaping._calls[0][0])
    model.train(training)
    found = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert found.shape == (2, 9)
    assert kept() is None and not any(shaping._calls)
    with pytest.raises(ValueError, match="no router logits"):
        shaping.loss()
    model.train()
    model(input_ids=tokens)
    assert shaping.loss().requires_grad


@architectures
def test_evaluation_keeps_nothing(name: str) -> None:
    model = make_model(name).eval()
    shaping = shape_routing(model, AdamW(model.parameters()))
    model(input_ids=make_tokens())
    assert not any(shaping._calls)
    with torch.no_grad():
        model.train()(input_ids=make_tokens())
    assert not any(shaping._calls)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    kinds += ("_forward_hooks_always_called", "_backward_hooks", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@architectures
def test_removal_restores_the_model(name: str) -> None:
    model = make_model(name)
    tokens = make_tokens()
    before, kept = hooks(model), set(model.state_dict())
    expected = model(input_ids=tokens).logits
    with shape_routing(model, AdamW(model.parameters())) as shaping:
        assert hooks(model) > before
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=0)
        assert shaping.loss() > 0
        model(input_ids=tokens)
    assert hooks(model) == before and set(model.state_dict()) == kept
    assert not any(shaping._calls)
    model(input_ids=tokens)
    with pytest.raises(ValueError, match="no router logits"):
        shaping.loss()
    shaping.remove()


@pytest.mark.parametrize("function", [torch.softmax, lambda x, dim: x.sigmoid()])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_probabilities_under_the_name_of_logits(function: Any, checkpointing: bool) -> None:
    model = make_model("qwen3_moe")
    tokens = make_tokens()

    def step() -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        with shape_routing(model, AdamW(model.parameters())) as shaping:
            model(input_ids=tokens, use_cache=False)
            logits = [site.detach() for site in shaping.logits()]
            shaping.loss().backward()
        return logits, gradients(model)

    logits, grads = step()
    for router, _ in routed(model):
        right = router.forward

        def wrong(x: Tensor, right: Any = right) -> tuple[Tensor, ...]:
            logits, *rest = right(x)
            return function(logits, dim=-1), *rest

        router.forward = wrong
    if checkpointing:
        checkpoint(model)
    found, found_grads = step()
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(found_grads, grads)


def test_padding_does_not_count() -> None:
    model = make_model("mixtral")
    optimizer = AdamW(model.parameters())
    set_moments(model, optimizer, [1.0, 9.0, 4.0, 1.0])
    shaping = shape_routing(model, optimizer)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    model(input_ids=make_tokens(), attention_mask=mask)
    kept = [site[mask.reshape(-1).bool()] for site in shaping.logits()]
    same = RoutingShaper(model, sites=shaping.shaper.sites).calculate_meta_loss(kept, optimizer)
    assert shaping.loss(mask).item() == pytest.approx(same.item())
    model(input_ids=make_tokens())
    with pytest.raises(ValueError, match="mask must have an entry for each of the 12 tokens"):
        shaping.loss(torch.ones(2, 5))


def test_the_loss_of_a_forward_is_taken_once() -> None:
    model = make_model("mixtral")
    shaping = shape_routing(model, AdamW(model.parameters()))
    with pytest.raises(ValueError, match="A forward of the MixtralForCausalLM keeps them"):
        shaping.loss()
    model(input_ids=make_tokens())
    shaping.loss()
    with pytest.raises(ValueError, match="until the loss is taken, once"):
        shaping.loss()


def test_a_forward_that_fails_keeps_nothing_open() -> None:
    model = make_model("mixtral")
    shaping = shape_routing(model, AdamW(model.parameters()))
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=make_tokens(), labels=torch.zeros(3, 3).long())
    assert not shaping._reading
    model(input_ids=make_tokens())
    assert shaping.logits()[0].shape == (12, E)


def test_the_optimizer_may_come_later_or_be_wrapped() -> None:
    model = make_model("gpt_oss")
    shaping = shape_routing(model)
    tokens = make_tokens()
    model(input_ids=tokens)
    with pytest.raises(ValueError, match="shape_routing\\(model, optimizer\\)"):
        shaping.loss()
    raw = AdamW(model.parameters(), lr=1e-2)
    shaping.optimizer = Accelerator(cpu=True).prepare(raw)
    costs = []
    for _ in range(3):
        (model(input_ids=tokens, labels=tokens).loss + shaping.loss()).backward()
        costs.append(shaping.shaper.strategies["fars"].costs(shaping.shaper.sites, raw)[0])
        shaping.optimizer.step()
        shaping.optimizer.zero_grad()
    assert costs[0].tolist() == [1.0] * E
    assert not torch.equal(costs[1], costs[0]) and not torch.equal(costs[2], costs[1])


def test_balance_needs_no_optimizer() -> None:
    model = make_model("olmoe")
    shaping = shape_routing(model, strategy="balance")
    model(input_ids=make_tokens())
    assert shaping.loss() > 0


def test_a_deep_copy_of_the_model_is_not_read() -> None:
    model = make_model("olmoe")
    shaping = shape_routing(model, AdamW(model.parameters()))
    model(input_ids=make_tokens())
    average = copy.deepcopy(model)
    kept = [site.clone() for site in shaping.logits()]
    average(input_ids=make_tokens())
    torch.testing.assert_close(shaping.logits(), kept, rtol=0, atol=0)


class TwicePassed(nn.Module):
    """One of our sites, passed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.site = MixtureOfExperts(LinearRouter(D, E), GroupedExperts(E, D), K)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(self.site(x))


def test_a_site_that_is_passed_twice() -> None:
    model = TwicePassed()
    optimizer = AdamW(model.parameters())
    shaping = shape_routing(model, optimizer, w_meta=1.0, cost_alpha=0.0)
    x, mask = torch.randn(2, 3, D), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad():
        both = [model.site.router(y.reshape(-1, D)) for y in (x, model.site(x))]
    model(x)
    kept = torch.cat([logits[mask.reshape(-1).bool()] for logits in both])
    torch.testing.assert_close(shaping.logits(), [torch.cat(both)])
    entropy = torch.distributions.Categorical(logits=kept).entropy().mean()
    torch.testing.assert_close(shaping.loss(mask), entropy)


class Hot(nn.Module):
    """A mixture of a kind that no one has seen: scaled logits, no num_experts, no top_k."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(D, E, bias=False)
        self.choose.register_forward_hook(lambda module, inputs, output: output / 7)
        self.bank = nn.Module()
        self.bank.w = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,ne,edo->no", x, self.choose(x).softmax(-1), self.bank.w)


def test_an_unknown_architecture_says_what_was_looked_for() -> None:
    with pytest.raises(ValueError, match="Hot has no routed site. Looked for .*ExpertSite"):
        shape_routing(Hot())


def test_a_described_site() -> None:
    model, x = Hot(), torch.randn(5, D)
    told = ExpertSite(model.choose, model.bank, K, lambda router, x, output: output * 7)
    optimizer = AdamW(model.parameters())
    shaping = shape_routing(model, optimizer, sites=[told])
    (site,) = shaping.shaper.sites
    assert (site.name, site.num_experts, list(site.parameters)) == ("bank", E, ["bank.w"])
    model(x).sum().backward()
    torch.testing.assert_close(shaping.logits(), [F.linear(x, model.choose.weight)])
    optimizer.step()
    model(x)
    shaping.loss().backward()
    assert (optimizer.state[model.bank.w]["exp_avg_sq"] > 0).any()


def test_logits_that_cannot_be_told_are_refused() -> None:
    model = Hot()
    shape_routing(model, sites=[ExpertSite(model.choose, model.bank, K)])
    with pytest.raises(ValueError, match="bank .Linear. returns neither .* logits=: a function"):
        model(torch.randn(5, D))


def test_descriptions_that_do_not_fit_are_refused() -> None:
    model = Hot()
    model.other = nn.Linear(D, D)
    cases = {
        "doesn't hold the Linear": ExpertSite(nn.Linear(D, E), model.bank, K),
        "must be a module of nothing but stacked parameters": ExpertSite(model.choose, model, K),
        f"is no matrix .{E}, D.": ExpertSite(model.other, model.bank, K),
    }
    model.bank.b = nn.Parameter(torch.zeros(E + 1))
    with pytest.raises(ValueError, match="nothing but stacked"):
        shape_routing(model, sites=[ExpertSite(model.choose, model.bank, K)])
    del model.bank.b
    for message, site in cases.items():
        with pytest.raises(ValueError, match=message):
            shape_routing(model, sites=[site])
    with pytest.raises(ValueError, match="at least one"):
        shape_routing(model, sites=[])
    assert hooks(model) == hooks(Hot())


def test_a_list_of_experts_is_refused_by_name() -> None:
    block = nn.Module()
    block.gate = nn.Linear(D, E)
    block.ffn = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
    with pytest.raises(ValueError, match="'0.ffn' is an nn.ModuleList: its experts must be stack"):
        shape_routing(nn.Sequential(block))
    with pytest.raises(ValueError, match="nothing but stacked.* Got ModuleList"):
        shape_routing(block, sites=[ExpertSite(block.gate, block.ffn, K)])


def test_experts_without_one_router_or_a_top_k_are_refused() -> None:
    block = nn.Module()
    block.experts = GroupedExperts(E, D)
    with pytest.raises(ValueError, match=f"one router beside the {E} experts of '0'.* Got 0"):
        find_expert_sites(nn.Sequential(block))
    block.gate = nn.Linear(D, E)
    with pytest.raises(ValueError, match="'0' has no num_experts_per_tok or top_k"):
        find_expert_sites(nn.Sequential(block))
    block.top_k = 1
    (site,) = find_expert_sites(nn.Sequential(block))
    assert site == ExpertSite(block.gate, block.experts, 1)
    block.other = nn.Linear(D, E)
    with pytest.raises(ValueError, match="Got 2"):
        find_expert_sites(nn.Sequential(block))


def test_a_site_that_is_not_reached_is_an_error_and_can_be_left_out() -> None:
    model = nn.Module()
    model.used, model.idle = TwicePassed(), TwicePassed()
    model.forward = model.used.forward
    optimizer = AdamW(model.parameters())
    x = torch.randn(1, 3, D)
    with shape_routing(model, optimizer) as shaping:
        model(x)
        with pytest.raises(ValueError, match="kept no logits of idle.site.experts"):
            shaping.loss()
    shaping = shape_routing(model, optimizer, sites=find_expert_sites(model)[:1])
    model(x)
    assert shaping.loss().requires_grad


def test_shaping_does_not_load_the_library() -> None:
    code = "import sys, tiny_onn.shaping; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
