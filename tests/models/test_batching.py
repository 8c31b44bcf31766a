"""What stands beside a sequence changes nothing: padding, other rows, packed neighbours, and
tokens that come later."""

from __future__ import annotations

import shutil

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, assert_near
from torch import Tensor

PAD = 14
POSITIONS = pytest.mark.parametrize("position_type", ["grid", "sequence"])
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@POSITIONS
@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_nothing(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str, attention: str, side: str
) -> None:
    model = make_model(position_type=position_type)
    model.set_attn_implementation(attention)
    sequences = [make_tokens(1, length, seed=length)[0] for length in (24, 17, 5)]
    rows = []
    for sequence in sequences:
        padding = torch.full((24 - len(sequence),), PAD)
        rows.append(torch.cat([padding, sequence] if side == "left" else [sequence, padding]))
    ids = torch.stack(rows)
    tasks = torch.tensor([2, 0, 1])
    logits = model(ids, attention_mask=(ids != PAD).long(), task_ids=tasks).logits
    assert logits.isfinite().all()
    for row, sequence in enumerate(sequences):
        alone = model(sequence[None], task_ids=tasks[row : row + 1]).logits[0]
        assert_near(logits[row][ids[row] != PAD], alone)


def packed(sequences: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """One row of sequences with padding behind, and the segment of each token (-1: padding)."""
    segments = [torch.full((len(s),), i) for i, s in enumerate(sequences)]
    room = length - sum(map(len, sequences))
    ids = torch.cat([*sequences, torch.full((room,), PAD)])
    return ids[None], torch.cat([*segments, torch.full((room,), -1)])[None]


@POSITIONS
@ATTENTION
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_do_not_see_each_other(
    make_model: MakeModel,
    make_tokens: MakeTokens,
    position_type: str,
    attention: str,
    use_cache: bool,
) -> None:
    """Through the library's mask, which a cache asks for, and through our own."""
    model = make_model(position_type=position_type)
    model.set_attn_implementation(attention)
    sequences = [make_tokens(1, length, seed=length)[0] for length in (13, 1, 20)]
    # A sequence may begin in the middle of a grid, too.
    sequences.append(torch.tensor([1, 10, 2, 11, 3, 10, 12, 4]))
    ids, segments = packed(sequences, 50)
    tasks = segments.clamp_min(0) % 3
    output = model(
        ids, segment_ids=segments, task_ids=tasks, output_router_logits=True, use_cache=use_cache
    )
    assert output.logits.isfinite().all()
    for number, sequence in enumerate(sequences):
        alone = model(
            sequence[None], task_ids=torch.tensor([number % 3]), output_router_logits=True
        )
        chosen = segments[0] == number
        assert_near(output.logits[0][chosen], alone.logits[0])
        for site, expected in zip(output.router_logits, alone.router_logits, strict=True):
            assert_near(site[chosen], expected)


@ATTENTION
def test_the_quick_mask_of_packed_rows_is_the_librarys(
    make_model: MakeModel, make_tokens: MakeTokens, attention: str
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    ids, segments = packed([make_tokens(1, n, seed=n)[0] for n in (9, 4, 12)], 30)
    ids, segments = torch.cat([ids, ids]), torch.cat([segments, segments.flip(1)])
    quick = model(ids, segment_ids=segments, use_cache=False).logits
    # Any mask of the user's goes the library's way.
    plain = model(ids, segment_ids=segments, attention_mask=torch.ones_like(ids)).logits
    assert_near(quick, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, segment_ids=segments, use_cache=False).logits.float()
    assert rounded.isfinite().all()
    # bfloat16 keeps 8 bits; a token near the edge between two experts may cross it.
    assert (rounded - quick).abs().median() < 0.05


def test_gradients_of_packed_sequences_add_up(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    model = make_model()
    sequences = [make_tokens(1, length, seed=length)[0] for length in (11, 7)]
    ids, segments = packed(sequences, 18)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        named = {name: p for name, p in model.named_parameters() if "embed_" not in name}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def total(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[..., 3].sum()

    together = gradients(total(model(ids, segment_ids=segments).logits))
    apart = [gradients(total(model(s[None]).logits)) for s in sequences]
    for name, gradient in together.items():
        # Sums over all tokens, of gradients up to some tens.
        torch.testing.assert_close(gradient, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-4)


@POSITIONS
@ATTENTION
@pytest.mark.parametrize("masked", [True, False])
def test_a_later_token_changes_no_earlier_logits(
    make_model: MakeModel, make_tokens: MakeTokens, position_type: str, attention: str, masked: bool
) -> None:
    model = make_model(position_type=position_type)
    model.set_attn_implementation(attention)
    ids = make_tokens(2, 20)
    mask = torch.ones_like(ids)
    if masked:
        ids[1, :4], mask[1, :4] = PAD, 0
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % 10
    before, after = (
        model(x, attention_mask=mask if masked else None).logits for x in (ids, changed)
    )
    real = mask[:, :12].bool()
    assert_near(before[:, :12][real], after[:, :12][real])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-4


def test_eager_and_sdpa_agree(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    for changes in ({}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}):
        model = make_model(**changes)
        ids = make_tokens(2, 30)
        ids[0, :6] = PAD
        found = []
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            found.append(model(ids, attention_mask=(ids != PAD).long()).logits)
        assert_near(found[0][ids != PAD], found[1][ids != PAD])


# torch warns of its own compiler, and of how the library asks it to compile the mask.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention_agrees(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    """In a forward pass; torch 2.13 on a CPU compiles none for a single query."""
    if shutil.which("g++") is None:
        pytest.skip("flex_attention is compiled by g++")
    model = make_model()
    ids = make_tokens(2, 30)
    ids[0, :6] = PAD
    mask = (ids != PAD).long()
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
    assert_near(found[ids != PAD], expected[ids != PAD])


def test_grouped_key_value_heads_are_shared(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    """A model whose experts share their keys equals the model in which each place of a chosen
    expert has its own copy of them."""
    shared = make_model(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    copied = make_model(num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    state = shared.state_dict()
    for name, weight in state.items():
        if name.endswith("kv_proj.weight"):
            key, value = weight.chunk(2)
            state[name] = torch.cat([key, key, value, value])
    copied.load_state_dict(state)
    ids = make_tokens(2, 20)
    assert_near(shared(ids).logits, copied(ids).logits)


@ATTENTION
def test_padding_under_bfloat16_autocast(
    make_model: MakeModel, make_tokens: MakeTokens, attention: str
) -> None:
    """A row of the mask that hides everything must not turn into not-a-numbers."""
    model = make_model()
    model.set_attn_implementation(attention)
    ids = make_tokens(2, 24)
    ids[0, :9] = PAD
    mask = (ids != PAD).long()
    plain = model(ids, attention_mask=mask).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, attention_mask=mask).logits.float()
    assert rounded.isfinite().all()
    # bfloat16 keeps 8 bits; a token near the edge between two experts may cross it.
    assert (rounded - plain)[mask.bool()].abs().median() < 0.05
