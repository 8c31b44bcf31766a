"""Every way of generating gives what greedy decoding without a cache gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, enable_checkpointing
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from tiny_onn.models import TinyOnnForCausalLM

NEW = 8
WAYS: dict[str, Callable[[TinyOnnForCausalLM], dict[str, Any]]] = {
    "static cache": lambda other: {"cache_implementation": "static"},
    "an assistant that is the model": lambda other: {"assistant_model": other},
    "an assistant that exits early": lambda other: {"assistant_early_exit": 1},
    "prompt look-up": lambda other: {"prompt_lookup_num_tokens": 3},
    "a prompt in chunks": lambda other: {"prefill_chunk_size": 4},
    "one beam": lambda other: {"num_beams": 1},
}


@pytest.fixture(params=["grid", "sequence"])
def model(request: pytest.FixtureRequest, make_model: MakeModel) -> TinyOnnForCausalLM:
    return make_model(position_type=request.param, eos_token_id=None)


def greedy(model: TinyOnnForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_greedy(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens, make_model: MakeModel, way: str
) -> None:
    ids = make_tokens(1, 10)
    expected = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids, **WAYS[way](model)), expected)


def test_an_assistant_of_other_weights_changes_nothing(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens
) -> None:
    """Its guesses are mostly wrong, so that the cache is cut back again and again."""
    torch.manual_seed(9)
    assistant = TinyOnnForCausalLM(model.config).eval()
    ids = make_tokens(1, 10)
    assert torch.equal(greedy(model, ids, assistant_model=assistant), greedy(model, ids))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_left_padded_batch_through_beams(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens, cache: str | None
) -> None:
    ids = make_tokens(2, 10)
    ids[1, :4] = model.config.pad_token_id
    options: dict[str, Any] = {"attention_mask": (ids != model.config.pad_token_id).long()}
    for beams in (1, 3):
        options["num_beams"] = beams
        found = greedy(model, ids, cache_implementation=cache, **options)
        assert torch.equal(found, greedy(model, ids, use_cache=False, **options))


def test_a_criterion_stops(model: TinyOnnForCausalLM, make_tokens: MakeTokens) -> None:
    class AtTwelve(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    ids = make_tokens(2, 10)
    found = greedy(model, ids, stopping_criteria=StoppingCriteriaList([AtTwelve()]))
    assert torch.equal(found, greedy(model, ids)[:, :12])


@pytest.mark.parametrize("only_new", [True, False])
def test_generation_goes_on_from_a_cache(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens, only_new: bool
) -> None:
    """With all tokens so far, or with those that the cache hasn't seen and a mask of all."""
    ids = make_tokens(2, 10)
    ids[1, :4] = model.config.pad_token_id
    mask = (ids != model.config.pad_token_id).long()
    whole = greedy(model, ids, attention_mask=mask)
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    rest = model.generate(
        first.sequences[:, -1:] if only_new else first.sequences,
        attention_mask=torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW - 3,
        do_sample=False,
    )
    assert torch.equal(rest[:, 3 - NEW :], whole[:, 3 - NEW :])


def test_embeddings_beside_tokens_and_alone(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens
) -> None:
    """Beside their tokens embeddings have the tokens' positions; alone they stand in one row."""
    ids = make_tokens(2, 10)
    embeds = model.get_input_embeddings()(ids)
    expected = greedy(model, ids)[:, 10:]
    for use_cache in (True, False):
        found = greedy(model, ids, inputs_embeds=embeds, use_cache=use_cache)
        assert torch.equal(found[:, -NEW:], expected)
    alone = [
        model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*alone)
    on_grid = model.config.position_type == "grid"
    assert torch.equal(alone[0], expected) is not on_grid


def test_what_a_step_returns(model: TinyOnnForCausalLM, make_tokens: MakeTokens) -> None:
    model.set_attn_implementation("eager")
    ids = make_tokens(2, 10)
    steps = {f"output_{name}": True for name in ("scores", "hidden_states", "attentions")}
    out = greedy(model, ids, return_dict_in_generate=True, **steps)
    assert len(out.scores) == len(out.hidden_states) == len(out.attentions) == NEW
    assert [h.shape for h in out.hidden_states[2]] == [(2, 1, 32)] * 3
    assert [a.shape for a in out.attentions[2]] == [(2, 2, 1, 12)] * 2
    assert [layer.keys.shape for layer in out.past_key_values.layers] == [(2, 1, 17, 16)] * 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}])
def test_beams_are_reordered_with_their_cache(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens, options: dict[str, Any]
) -> None:
    ids = make_tokens(2, 10)
    assert torch.equal(
        greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options)
    )


def test_sampling_draws_the_same_with_and_without_a_cache(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(2, 10)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(
                ids,
                max_new_tokens=NEW,
                do_sample=True,
                top_k=5,
                num_return_sequences=2,
                use_cache=use_cache,
            )
        )
    assert torch.equal(*drawn) and drawn[0].shape == (4, 10 + NEW)


def test_the_loss_takes_shifted_labels_and_a_number_of_items(
    model: TinyOnnForCausalLM, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(2, 10)
    labels = ids.clone()
    labels[:, 3] = -100
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=5).loss, total / 5)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    found = model(ids, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(found, total / 16)


def test_reentrant_checkpoints_are_refused_with_the_auxiliary_loss(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(1, 6)
    model = make_model(router_aux_loss_coef=0.1, output_router_logits=True).train()
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(ValueError, match="Re-entrant gradient checkpointing"):
        model(ids, labels=ids)
    assert model(ids, labels=ids, output_router_logits=False).loss.requires_grad
    assert torch.isfinite(model.eval()(ids, labels=ids).aux_loss)
    enable_checkpointing(model.train())
    model(ids, labels=ids).loss.backward()


def test_the_auxiliary_loss_counts_what_each_site_chooses(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    """Two heads can't be shared out among three experts: the attention sites choose two."""
    model = make_model(num_experts=4, num_experts_per_tok=3, router_aux_loss_coef=1.0)
    assert model.model.experts_per_site == [2, 3, 2, 3]
    out = model(make_tokens(4, 60), output_router_logits=True)
    by_site = []
    for logits, chosen in zip(out.router_logits, model.model.experts_per_site, strict=True):
        load = torch.zeros(4).index_add(
            0, logits.topk(chosen).indices.flatten(), torch.ones(len(logits) * chosen)
        )
        by_site.append(4 * (load / len(logits) * logits.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(out.aux_loss, torch.stack(by_site).mean())
