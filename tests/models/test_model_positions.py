"""Positions read off the tokens, against the plain reference, and the rotation by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import MakeModel, MakeTokens
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tiny_onn.arc import tokens
from tiny_onn.models import TinyOnnConfig
from tiny_onn.models.positions import TinyOnnRotaryEmbedding, grid_positions, rotate

streams = st.lists(st.integers(0, 15), min_size=1, max_size=60)


def positions(ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    return grid_positions(
        ids,
        row_end_token_id=tokens.ROW_END,
        grid_token_ids=(tokens.INPUT, tokens.OUTPUT),
        blank_token_ids=(tokens.END, tokens.PAD),
        segment_ids_BT=segment_ids,
    )


@given(streams)
@settings(max_examples=200, deadline=None)
def test_positions_equal_the_reference(stream: list[int]) -> None:
    found = positions(torch.tensor([stream]))[:, 0].numpy()
    real = np.array(stream) != tokens.PAD
    np.testing.assert_array_equal(found.T[real], tokens.grid_positions(stream)[real])


@given(st.lists(streams, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_packed_sequences_start_again(parts: list[list[int]]) -> None:
    packed = torch.tensor([sum(parts, [])])
    segments = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])[None]
    found = positions(packed, segments)
    expected = torch.cat([positions(torch.tensor([part])) for part in parts], dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_models_positions_are_those_of_its_configuration(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(4, 50)
    found = make_model().model.token_positions(ids)
    for row, ids_of_row in enumerate(ids):
        np.testing.assert_array_equal(found[:, row].numpy().T, tokens.grid_positions(ids_of_row))
    other = make_model(row_end_token_id=3, grid_token_ids=[4], eos_token_id=[5, 6], pad_token_id=7)
    stream = torch.tensor([[7, 4, 0, 3, 1, 1, 5, 6, 4, 2]])
    assert other.model.token_positions(stream)[:, 0].tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 2, 2, 2, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_rotation_is_the_complex_product() -> None:
    x = torch.randn(2, 3, 5, 8)
    angles = torch.randn(2, 5, 4)
    found = rotate(x, angles.cos(), angles.sin())
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(2, 5, 4), angles)[:, None]
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=-1))


def test_each_axis_has_its_own_frequencies() -> None:
    rotary = TinyOnnRotaryEmbedding(TinyOnnConfig(hidden_size=64, num_attention_heads=2))
    assert rotary.pairs_per_axis == (6, 6, 4)
    position = torch.tensor([5, 3, 2]).view(3, 1, 1)
    cos, sin = rotary(torch.empty(0), position)
    expected = [p * 100.0 ** -(i / n) for p, n in ((5, 6), (3, 6), (2, 4)) for i in range(n)]
    torch.testing.assert_close(cos[0, 0], torch.tensor(expected).cos())
    torch.testing.assert_close(sin[0, 0], torch.tensor(expected).sin())


def test_scores_depend_on_the_difference_of_positions_only() -> None:
    rotary = TinyOnnRotaryEmbedding(TinyOnnConfig(hidden_size=32, num_attention_heads=2))
    query, key = torch.randn(2, 1, 1, 1, 16)

    def score(at_query: list[int], at_key: list[int]) -> float:
        turned = [
            rotate(x, *rotary(torch.empty(0), torch.tensor(at).view(3, 1, 1)))
            for x, at in ((query, at_query), (key, at_key))
        ]
        return float((turned[0] * turned[1]).sum())

    base = score([4, 7, 2], [1, 5, 2])
    assert abs(score([14, 8, 6], [11, 6, 6]) - base) < 1e-5
    assert abs(score([5, 7, 2], [1, 5, 2]) - base) > 1e-3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_sequence_model_takes_the_librarys_rotary_scalings(rope: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
    rope = rope | {"rope_theta": 100.0}
    config = TinyOnnConfig(position_type="sequence", rope_parameters=rope, **sizes)
    positions = torch.arange(40)[None]
    cos, sin = TinyOnnRotaryEmbedding(config)(torch.empty(0), positions)
    llama = LlamaConfig(rope_parameters=rope, **sizes)
    expected = LlamaRotaryEmbedding(llama)(torch.empty(0), positions)
    torch.testing.assert_close(cos, expected[0][..., :8])
    torch.testing.assert_close(sin, expected[1][..., :8])
    config.position_type = "grid"
    with pytest.raises(ValueError, match="must be 'default'. Got"):
        TinyOnnRotaryEmbedding(config)
