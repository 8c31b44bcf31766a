"""The configuration: defaults that work, round trips, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from tiny_onn.models import TinyOnnConfig

BAD_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size must be at least 1. Got 0"),
    ({"hidden_size": 0}, "hidden_size must be at least 1. Got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1. Got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads must be at least 1. Got 0"),
    ({"num_experts": 0}, "num_experts must be at least 1. Got 0"),
    ({"moe_intermediate_size": -1}, "moe_intermediate_size must be at least 1. Got -1"),
    ({"num_tasks": -1}, "num_tasks must be at least 0. Got -1"),
    ({"num_symmetries": -2}, "num_symmetries must be at least 0. Got -2"),
    ({"hidden_dropout": 1.5}, "hidden_dropout must be at least 0 and below 1. Got 1.5"),
    ({"attention_dropout": -0.1}, "attention_dropout must be at least 0 and below 1. Got -0.1"),
    (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok must be between 1 and num_experts=4. Got 5",
    ),
    (
        {"num_experts_per_tok": 0},
        "num_experts_per_tok must be between 1 and num_experts=4. Got 0",
    ),
    ({"num_recurrences": 0}, "num_recurrences must be at least 1. Got 0"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads=4 must be a multiple of num_key_value_heads. Got 3",
    ),
    (
        {"num_key_value_heads": -1},
        "num_attention_heads=4 must be a multiple of num_key_value_heads. Got -1",
    ),
    ({"head_dim": 6}, "head_dim must be even and at least 8. Got 6"),
    ({"head_dim": 9}, "head_dim must be even and at least 8. Got 9"),
    (
        {"hidden_size": 4, "position_type": "sequence"},
        "head_dim must be even and at least 2. Got 1",
    ),
    (
        {"router": "mpl"},
        "router must be one of linear, cpr, capr, mlp, affine, quadratic. Got 'mpl'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10.0}},
        "rope_parameters['rope_type'] must be 'default'. Got 'yarn'",
    ),
    ({"rope_theta": -1.0}, "rope_parameters['rope_theta'] must be a positive number. Got -1.0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SIZES)
def test_a_size_out_of_bounds_is_named_with_its_bound_and_value(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TinyOnnConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "128"}, {"position_type": "spiral"}, {"use_cache": 1}, {"rms_norm_eps": "0"}],
)
def test_a_wrong_type_is_named(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}' expected"):
        TinyOnnConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_type": "sequence", "vocab_size": 99, "eos_token_id": [3, 4], "num_tasks": 7},
        {"num_key_value_heads": 2, "head_dim": 24, "router": "capr", "grid_token_ids": (5, 6, 7)},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "hidden_dropout": 0.5},
    ],
)
def test_a_configuration_survives_json_and_disk(changes: dict[str, Any], tmp_path: Path) -> None:
    config = TinyOnnConfig(**changes)
    again = TinyOnnConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TinyOnnConfig
    for name in config.to_diff_dict():
        if name != "transformers_version":
            assert getattr(loaded, name) == getattr(config, name), name


def test_what_follows_from_the_sizes() -> None:
    config = TinyOnnConfig(hidden_size=96, num_attention_heads=6)
    assert (config.head_dim, config.num_key_value_heads) == (16, 3)
    assert config.attention_experts_per_tok == 2
    odd = TinyOnnConfig(num_attention_heads=4, num_experts=8, num_experts_per_tok=3)
    assert (odd.attention_experts_per_tok, odd.num_key_value_heads) == (2, 2)
    narrow = TinyOnnConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    assert (narrow.head_dim, narrow.num_key_value_heads) == (8, 2)
    assert TinyOnnConfig(eos_token_id=[5, 6], pad_token_id=7).blank_token_ids == [5, 6, 7]
    assert TinyOnnConfig(eos_token_id=None, pad_token_id=None).blank_token_ids == []


def test_the_rotary_base() -> None:
    assert TinyOnnConfig().rope_parameters == {"rope_type": "default", "rope_theta": 100.0}
    assert TinyOnnConfig(position_type="sequence").rope_theta == 10_000.0
    assert TinyOnnConfig(rope_theta=7.0).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 7.0,
    }
    assert TinyOnnConfig(rope_parameters={"rope_theta": 7.0}).rope_theta == 7.0
    assert TinyOnnConfig(rope_parameters={"rope_type": "default"}).rope_theta == 100.0
