"""What a forward pass returns: losses, router logits, hidden states, and the embeddings' effect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_helpers import MakeModel, MakeTokens
from torch import Tensor

from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.routing.routers import load_balancing_loss
from tiny_onn.shaping import RoutingShaper
from tiny_onn.shaping.sites import find_sites


@pytest.mark.parametrize("position_type", ["grid", "sequence"])
def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str
) -> None:
    model = make_model(position_type=position_type)
    ids = make_tokens(2, 15)
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    assert output.logits.shape == (2, 15, 16)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    kept = (labels[:, 1:] != -100).sum()
    assert summed.item() == pytest.approx(expected.item() * kept.item() / 100, rel=1e-5)


def test_a_sequence_model_does_not_read_grids(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model(position_type="sequence")
    ids = make_tokens(2, 20)
    counted = torch.arange(20).expand(2, -1)
    torch.testing.assert_close(
        model(ids).logits, model(ids, position_ids=counted).logits, rtol=0, atol=0
    )
    # Rotary angles are relative: a shift is no change, a stretch is one.
    torch.testing.assert_close(
        model(ids).logits, model(ids, position_ids=counted + 9).logits, rtol=0, atol=1e-5
    )
    assert (model(ids).logits - model(ids, position_ids=3 * counted).logits).abs().max() > 1e-3


def test_grid_positions_given_or_read(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(2, 20)
    positions = model.model.token_positions(ids)
    torch.testing.assert_close(
        model(ids).logits, model(ids, position_ids=positions).logits, rtol=0, atol=0
    )
    for axis in range(3):
        moved = positions.clone()
        moved[axis] = 3 * moved[axis] + torch.arange(20)
        assert (model(ids).logits - model(ids, position_ids=moved).logits).abs().max() > 1e-3
    # A single axis is taken for columns.
    columns = torch.arange(20).expand(2, -1)
    stacked = torch.stack([torch.zeros_like(columns), columns, torch.zeros_like(columns)])
    torch.testing.assert_close(
        model(ids, position_ids=columns).logits,
        model(ids, position_ids=stacked).logits,
        rtol=0,
        atol=0,
    )


def test_router_logits_are_raw_and_stand_in_the_order_of_the_sites(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    sites = [site.name for site in find_sites(model)]
    assert sites == [
        f"model.layers.{i}.{part}.experts" for i in (0, 1) for part in ("self_attn.heads", "mlp")
    ]
    seen: dict[str, Tensor] = {}
    for name in sites:
        model.get_submodule(name.replace("experts", "router")).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
    output = model(make_tokens(2, 11), output_router_logits=True)
    assert len(output.router_logits) == 2 * model.config.num_hidden_layers
    for logits, name in zip(output.router_logits, sites, strict=True):
        assert logits.shape == (2 * 11, 4) and logits.dtype == torch.float32
        assert torch.equal(logits, seen[name])
        assert (logits.sum(-1) - 1).abs().max() > 0.1
        assert logits.requires_grad
    assert model(make_tokens(2, 11)).router_logits is None


def test_router_logits_are_float32_under_autocast(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    ids = make_tokens(2, 16)
    plain = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, output_router_logits=True)
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    # bfloat16 keeps 8 bits; a token near the edge between two experts may cross it.
    assert (output.logits.float() - plain).abs().median() < 0.05
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_shaper_shapes_the_models_routers(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    shaper = RoutingShaper(model)
    output = model(make_tokens(2, 11), output_router_logits=True)
    optimizer = torch.optim.AdamW(model.parameters())
    shaper.calculate_meta_loss(output.router_logits, optimizer).backward()
    for site in find_sites(model):
        for name, p in model.get_submodule(
            site.name.replace("experts", "router")
        ).named_parameters():
            assert p.grad is not None and p.grad.any(), (site.name, name)


@pytest.mark.parametrize("asked_by", ["argument", "configuration"])
def test_the_auxiliary_loss(make_model: MakeModel, make_tokens: MakeTokens, asked_by: str) -> None:
    changes = {"output_router_logits": True} if asked_by == "configuration" else {}
    arguments = {} if changes else {"output_router_logits": True}
    model = make_model(router_aux_loss_coef=0.3, **changes)
    ids = make_tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    output = model(ids, attention_mask=mask, labels=ids, **arguments)
    expected = load_balancing_loss(output.router_logits, 2, mask)
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    main = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(main.item() + 0.3 * expected.item(), rel=1e-5)
    assert model(ids, attention_mask=mask).loss is None
    quiet = make_model(router_aux_loss_coef=0.3)(ids, labels=ids)
    assert quiet.aux_loss is None and quiet.router_logits is None


def test_the_auxiliary_loss_does_not_stand_in_the_way_of_generation(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(2, 8)
    ids[0, :3] = 14
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": (ids != 14).long()}
    found = make_model(router_aux_loss_coef=0.3, output_router_logits=True).generate(
        ids, **settings
    )
    assert found.tolist() == make_model().generate(ids, **settings).tolist()


@pytest.mark.parametrize("name", ["task_ids", "symmetry_ids"])
def test_embeddings_matter_and_take_two_shapes(
    make_model: MakeModel, make_tokens: MakeTokens, name: str
) -> None:
    model = make_model()
    ids = make_tokens(2, 12)
    rows = torch.tensor([0, 2])
    short = model(ids, **{name: rows}).logits
    long = model(ids, **{name: rows[:, None].expand(2, 12)}).logits
    torch.testing.assert_close(short, long, rtol=0, atol=0)
    without, other = model(ids).logits, model(ids, **{name: rows.flip(0)}).logits
    for different in (without, other):
        assert (short - different).abs().amax((1, 2)).min() > 1e-3
    # Ids per token: the embedding of the later half leaves the earlier half alone.
    mixed = torch.tensor([[0] * 6 + [1] * 6, [2] * 12])
    halves = model(ids, **{name: mixed}).logits
    torch.testing.assert_close(halves[0, :6], short[0, :6], rtol=0, atol=1e-6)
    assert (halves[0, 6:] - short[0, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1,), (2, 5), (2, 1, 12)])
def test_ids_of_another_shape_are_refused(
    make_model: MakeModel, make_tokens: MakeTokens, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"must have shape \[2\] or \[2, 12\]. Got"):
        make_model()(make_tokens(2, 12), task_ids=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(12,), (2, 2, 12)])
def test_positions_of_another_shape_are_refused(
    make_model: MakeModel, make_tokens: MakeTokens, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"shape \[B, T\] or \[3, B, T\] .*'grid'. Got"):
        make_model()(make_tokens(2, 12), position_ids=torch.zeros(shape, dtype=torch.int64))


def test_a_model_without_embeddings(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model(num_tasks=0, num_symmetries=0)
    assert not [name for name, _ in model.named_parameters() if "embed_tasks" in name]
    assert model(make_tokens(2, 12)).logits.isfinite().all()


def test_embeddings_in_place_of_tokens(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(2, 12)
    embedded = model.get_input_embeddings()(ids)
    positions = model.model.token_positions(ids)
    found = model(inputs_embeds=embedded, position_ids=positions).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=0)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_only_the_logits_asked_for(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(2, 12)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    chosen = torch.tensor([1, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, whole[:, chosen])


def test_hidden_states_attentions_and_tuples(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    ids = make_tokens(2, 9)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 2, 9, 9)] * 2
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 9))
        assert not attention.triu(1).any()
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)


def test_tied_embeddings(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    tied: TinyOnnForCausalLM = make_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    ids = make_tokens(2, 9)
    output = tied(ids, output_hidden_states=True)
    expected = output.hidden_states[-1] @ tied.model.embed_tokens.weight.T
    torch.testing.assert_close(output.logits, expected)
    untied = make_model()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_dropout_acts_in_training_only(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    ids = make_tokens(2, 9)
    for name in ("hidden_dropout", "attention_dropout"):
        model = make_model(**{name: 0.5})
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        torch.manual_seed(5)
        first = model(ids).logits
        torch.manual_seed(5)
        assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("silent", ["o_proj", "down_proj"])
def test_hidden_dropout_acts_on_attention_and_on_experts(
    make_model: MakeModel, make_tokens: MakeTokens, silent: str
) -> None:
    model = make_model(hidden_dropout=0.5).train()
    for name, p in model.named_parameters():
        if silent in name and "router" not in name:
            torch.nn.init.zeros_(p)
    ids = make_tokens(2, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_resized_embeddings(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(20, mean_resizing=False)
    after = model(ids, labels=ids)
    torch.testing.assert_close(after.logits[..., :16], before)
    assert after.logits.shape[-1] == model.config.vocab_size == 20
    assert after.loss.isfinite()


def test_a_shared_expert_computes_every_token(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    plain, model = make_model(), make_model(shared_expert_intermediate_size=8)
    site = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    routed = plain.model.layers[0].mlp
    routed.load_state_dict(site.state_dict(), strict=False)
    gate, up = (x @ site.shared.gate_up_proj.weight.T).chunk(2, -1)
    shared = (torch.nn.functional.silu(gate) * up) @ site.shared.down_proj.weight.T
    torch.testing.assert_close(site(x), routed(x) + shared)
    assert len(find_sites(model)) == len(find_sites(plain))
    ids = make_tokens(1, 9)
    assert torch.isfinite(model(ids, labels=ids).loss)
