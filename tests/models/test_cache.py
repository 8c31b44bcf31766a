"""Decoding with a cache equals decoding without one, however the tokens arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, assert_near
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM

PAD, END = 14, 13
POSITIONS = pytest.mark.parametrize("position_type", ["grid", "sequence"])


def never_ending(model: TinyOnnForCausalLM) -> dict[str, Any]:
    """Keywords for greedy generation that stops only at its length."""
    model.generation_config.eos_token_id = None
    return {"do_sample": False, "pad_token_id": PAD}


@POSITIONS
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [17, 1, 1, 5, 16], [39, 1]])
def test_chunks_through_a_cache_equal_one_pass(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str, chunks: list[int]
) -> None:
    model = make_model(position_type=position_type)
    ids = make_tokens(3, 40)
    ids[1, 20], ids[2, 5] = END, PAD  # blanks inside a sequence take no place either
    whole = model(ids, use_cache=False).logits
    cache, parts = None, []
    for chunk in ids.split(chunks, dim=1):
        outputs = model(chunk, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    assert cache is not None and cache.get_seq_length() == 40
    assert_near(torch.cat(parts, dim=1), whole)


@POSITIONS
def test_a_left_padded_batch_through_a_cache(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str
) -> None:
    model = make_model(position_type=position_type)
    ids = make_tokens(2, 30)
    ids[1] = torch.cat([torch.full((9,), PAD), ids[1, :21]])
    mask = (ids != PAD).long()
    alone = model(ids[1:, 9:]).logits
    cache = None
    parts = []
    for start, end in ((0, 12), (12, 13), (13, 20), (20, 30)):
        outputs = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    assert_near(torch.cat(parts, dim=1)[1:, 9:], alone)


@POSITIONS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_with_and_without_a_cache(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str, attention: str
) -> None:
    model = make_model(position_type=position_type)
    model.set_attn_implementation(attention)
    ids = make_tokens(3, 12)
    ids[1, :5], ids[2, :1] = PAD, PAD
    mask = (ids != PAD).long()
    settings = never_ending(model) | {"max_new_tokens": 25, "task_ids": torch.tensor([0, 2, 1])}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert cached.shape == (3, 37)
    assert cached.tolist() == plain.tolist()
    for row in range(3):
        real = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        one = settings | {"task_ids": settings["task_ids"][row : row + 1]}
        alone = model.generate(real, attention_mask=torch.ones_like(real), **one)
        assert alone[0, real.shape[1] :].tolist() == cached[row, 12:].tolist()


@POSITIONS
def test_greedy_generation_is_the_argmax_of_whole_sequences(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str
) -> None:
    model = make_model(position_type=position_type)
    ids = make_tokens(2, 8)
    generated = model.generate(ids, max_new_tokens=20, **never_ending(model))
    expected = model(generated).logits[:, 7:-1].argmax(-1)
    assert generated[:, 8:].tolist() == expected.tolist()
    assert len(set(generated[:, 8:].flatten().tolist())) > 1


def test_generate_goes_on_from_a_cache(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(2, 10)
    settings = never_ending(model)
    whole = model.generate(ids, max_new_tokens=14, **settings)
    first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **settings)
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=8, **settings
    )
    assert rest.tolist() == whole.tolist()


def test_generate_stops_at_the_end_token(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(4, 10)
    free = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)[:, 10:]
    end = int(free[0, 3])
    stopped = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end)[:, 10:]
    for free_row, row in zip(free.tolist(), stopped.tolist(), strict=True):
        if end in free_row:
            first = free_row.index(end)
            assert row[: first + 1] == free_row[: first + 1]
            assert set(row[first + 1 :]) <= {PAD}
        else:
            assert row == free_row[: len(row)]


@pytest.mark.parametrize("name", ["task_ids", "symmetry_ids"])
def test_ids_per_token_reach_every_generated_token(
    make_model: MakeModel, make_tokens: MakeTokens, name: str
) -> None:
    """A new token belongs to the task of the last token before it."""
    model = make_model()
    ids = make_tokens(2, 8)
    rows = torch.tensor([[0, 0, 0, 2, 2, 2, 1, 1], [2, 2, 2, 2, 0, 0, 0, 0]])
    settings = never_ending(model) | {"max_new_tokens": 10, name: rows}
    cached = model.generate(ids, **settings)
    assert cached.tolist() == model.generate(ids, use_cache=False, **settings).tolist()
    all_rows = torch.cat([rows, rows[:, -1:].expand(2, 10)], dim=1)
    expected = model(cached, **{name: all_rows}).logits[:, 7:-1].argmax(-1)
    assert cached[:, 8:].tolist() == expected.tolist()
    settings[name] = rows[:, 0]
    assert cached.tolist() != model.generate(ids, **settings).tolist()


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 5},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampling", "beams", "several beams", "several samples"],
)
def test_a_default_configuration_generates(mode: dict[str, Any], make_tokens: MakeTokens) -> None:
    torch.manual_seed(0)
    model = TinyOnnForCausalLM(TinyOnnConfig(num_hidden_layers=2)).eval()
    ids = make_tokens(2, 6)
    torch.manual_seed(1)
    found = model.generate(ids, max_new_tokens=9, **mode)
    rows = 2 * mode.get("num_return_sequences", 1)
    assert found.shape[0] == rows and 6 < found.shape[1] <= 15
    repeats = mode.get("num_return_sequences", 1)
    assert torch.equal(found[:, :6], ids.repeat_interleave(repeats, dim=0))
    torch.manual_seed(1)
    again = model.generate(ids, max_new_tokens=9, use_cache=False, **mode)
    assert again.tolist() == found.tolist()


def test_beams_find_what_is_at_least_as_probable_as_the_greedy_answer(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    settings = never_ending(model) | {"max_new_tokens": 6}
    ids = make_tokens(1, 6)

    def log_probability(sequence: Tensor) -> float:
        with torch.no_grad():
            log_p = model(sequence).logits[:, 5:-1].log_softmax(-1)
        return float(log_p.gather(-1, sequence[:, 6:, None]).sum())

    greedy = model.generate(ids, **settings)
    beams = model.generate(ids, num_beams=16, **settings)
    assert log_probability(beams) >= log_probability(greedy)


def test_generation_from_embeddings(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model(position_type="sequence")
    settings = never_ending(model) | {"max_new_tokens": 8}
    ids = make_tokens(2, 6)
    embedded = model.get_input_embeddings()(ids)
    from_ids = model.generate(ids, **settings)[:, 6:]
    assert model.generate(inputs_embeds=embedded, **settings).tolist() == from_ids.tolist()


def test_a_cache_filled_with_given_positions_cannot_be_read_from_tokens(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    ids = make_tokens(2, 6)
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=model.model.token_positions(ids), past_key_values=cache)
    with pytest.raises(ValueError, match=r"give position_ids of shape \[3, B, T\]"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@POSITIONS
def test_positions_follow_what_is_done_to_a_cache(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str, kind: type
) -> None:
    """Reordered as beams are, cropped as guesses are, reset: positions are those of the tokens."""
    model = make_model(position_type=position_type, num_recurrences=2)
    ids = make_tokens(3, 12)
    whole = model(ids, use_cache=False).logits
    static = kind is StaticCache
    cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()
    model(ids[:, :7], past_key_values=cache)
    chosen = torch.tensor([2, 0, 0])
    cache.reorder_cache(chosen)
    assert_near(model(ids[chosen, 7:], past_key_values=cache).logits, whole[chosen, 7:])
    assert len(cache.layers) == 4
    if not static:
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        chosen = torch.tensor([2, 2, 0, 0])
        assert_near(model(ids[chosen, 9:], past_key_values=cache).logits, whole[chosen, 9:])
    else:
        cache.reset()
        assert_near(model(ids, past_key_values=cache).logits, whole)


def test_a_packed_row_needs_an_empty_cache(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model()
    ids = make_tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="segment_ids need an empty cache. Got one of 6 tokens"):
        model(ids, past_key_values=cache, segment_ids=torch.zeros_like(ids))
