"""Depth by recurrence: the stack applied again, with caches and routes of its own each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, assert_near

from tiny_onn.shaping import RoutingShaper

MODES: list[dict[str, Any]] = [{"num_recurrences": 3}, {"num_recurrences": 3, "halting": True}]


def test_one_round_of_a_stack_is_the_plain_model(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    plain = make_model()
    halting = make_model(halting=True)
    halting.load_state_dict(plain.state_dict(), strict=False)
    ids = make_tokens(2, 12)
    assert torch.equal(plain(ids).logits, halting(ids).logits)


def test_a_decoders_configuration_counts_every_round(make_model: MakeModel) -> None:
    """It is what the library makes caches from, and the same one else."""
    config = make_model(num_recurrences=3).config
    decoder = config.get_text_config(decoder=True)
    assert (decoder.num_hidden_layers, config.num_hidden_layers) == (6, 2)
    decoder.output_router_logits = True
    assert config.output_router_logits
    assert config.get_text_config() is config
    assert make_model().config.get_text_config(decoder=True).num_hidden_layers == 2


def test_two_rounds_are_twice_the_layers_with_the_same_weights(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    twice = make_model(num_recurrences=2)
    deep = make_model(num_hidden_layers=4)
    state = twice.state_dict()
    for name, value in list(state.items()):
        for layer in (0, 1):
            if f"layers.{layer}." in name:
                state[name.replace(f"layers.{layer}.", f"layers.{layer + 2}.")] = value
    deep.load_state_dict(state)
    ids = make_tokens(2, 12)
    ours, theirs = (m(ids, output_router_logits=True) for m in (twice, deep))
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.router_logits) == len(theirs.router_logits) == 8
    for a, b in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(a, b)
    greedy = (m.generate(ids, max_new_tokens=6, do_sample=False) for m in (twice, deep))
    assert torch.equal(*greedy)


def test_the_answer_is_the_mixture_that_the_halting_head_asks_for(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model(num_recurrences=3, halting=True)
    ids = make_tokens(1, 9)
    head = model.model.halt_head
    rounds = [make_model(num_recurrences=r) for r in (1, 2, 3)]
    for stage in rounds:
        stage.load_state_dict(model.state_dict(), strict=False)
        stage.model.norm = torch.nn.Identity()
    states = [stage.model(ids).last_hidden_state for stage in rounds]
    stops = [head(state).sigmoid() for state in states[:2]]
    shares = [stops[0], (1 - stops[0]) * stops[1], (1 - stops[0]) * (1 - stops[1])]
    mixed = sum(share * state for share, state in zip(shares, states, strict=True))
    assert_near(model.model(ids).last_hidden_state, model.model.norm(mixed))
    with torch.no_grad():
        head.bias.fill_(50.0)
    assert_near(model.model(ids).last_hidden_state, model.model.norm(states[0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_caches_batches_and_padding_change_nothing(
    make_model: MakeModel, make_tokens: MakeTokens, mode: dict[str, Any], cache: str | None
) -> None:
    model = make_model(eos_token_id=None, **mode)
    ids = make_tokens(2, 8)
    expected = model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)
    found = model.generate(ids, max_new_tokens=7, do_sample=False, cache_implementation=cache)
    assert torch.equal(found, expected)
    padded = torch.cat([torch.full((2, 3), model.config.pad_token_id), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = model.generate(padded, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(found[:, 3:], expected)
    assert_near(model(ids[:1]).logits, model(ids).logits[:1])


def test_every_round_is_shaped_and_counted(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model(num_recurrences=2, halting=True, router_aux_loss_coef=0.1).train()
    ids = make_tokens(2, 12)
    out = model(ids, labels=ids, output_router_logits=True)
    assert out.aux_loss.item() >= 1
    optimizer = torch.optim.Adam(model.parameters())
    loss = RoutingShaper(model).calculate_meta_loss(out.router_logits, optimizer)
    (out.loss + loss).backward()
    assert all(
        p.grad is not None and p.grad.any()
        for name, p in model.named_parameters()
        if "embed_tasks" not in name and "embed_symmetries" not in name
    )
