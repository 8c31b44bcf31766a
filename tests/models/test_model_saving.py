"""Saving, loading and initialising as the library does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import MakeModel, MakeTokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel
from tiny_onn.routing import ROUTERS


@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_is_bit_for_bit(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path, tied: bool
) -> None:
    model = make_model(tie_word_embeddings=tied, num_key_value_heads=1, router="capr")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is TinyOnnForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight) and state[name].dtype == weight.dtype, name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    ids = make_tokens(2, 10)
    # Weights read from a file lie less aligned in memory, and other kernels round otherwise.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert not loaded.training


def test_the_auto_classes_know_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TinyOnnConfig
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TinyOnnModel
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, model.model.state_dict()[name]), name
    assert type(AutoModelForCausalLM.from_config(model.config)) is TinyOnnForCausalLM


def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_is_kept(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    lost = "model.layers.0.mlp.router.down_proj"
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = TinyOnnForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}
    for name, weight in loaded.state_dict().items():
        if name == lost:
            assert weight.isfinite().all() and 0.05 < weight.std() < 1
        else:
            assert torch.equal(weight, model.state_dict()[name]), name


def test_what_weights_are_drawn_from(make_model: MakeModel) -> None:
    model = make_model(hidden_size=64, vocab_size=300, initializer_range=0.5)
    layer = model.model.layers[0]
    assert 0.48 < model.model.embed_tokens.weight.std() < 0.52
    for weight in (layer.self_attn.kv_proj.weight, layer.mlp.experts.gate_up_proj):
        assert 0.9 < weight.std() * 8 < 1.1


@pytest.mark.parametrize("router", ROUTERS)
def test_initialisation_on_the_meta_device(make_model: MakeModel, router: str) -> None:
    """A model built without memory and then initialised is as good as one built in place."""
    plain = make_model(router=router)
    with torch.device("meta"):
        model = TinyOnnForCausalLM(plain.config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(1)
    model.apply(model._init_weights)
    with torch.no_grad():
        # Norms are drawn by nobody: the library's initialisation sets them to one.
        for (name, p), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.isfinite().all(), name
            assert p.std().item() == pytest.approx(reference.std().item(), rel=0.5, abs=1e-3), name


def test_half_precision_weights(
    make_model: MakeModel, make_tokens: MakeTokens, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path)
    model = TinyOnnForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    ids = make_tokens(2, 10)
    output = model(ids, output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    assert (output.logits.float() - make_model()(ids).logits).abs().median() < 0.1
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 2
