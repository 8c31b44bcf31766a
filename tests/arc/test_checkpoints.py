"""Checkpoints: whole or not at all, refused by name, and exact."""

import json
import pickle

import pytest
import torch

from tiny_onn.arc import checkpoints as module
from tiny_onn.arc.checkpoints import CheckpointError, Checkpoints
from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.optim import ARS2Neo, param_groups


def build(hidden=32, kind="ars2neo", experts=4):
    torch.manual_seed(0)
    config = TinyOnnConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=16,
        num_experts=experts,
    )
    model = TinyOnnForCausalLM(config)
    if kind == "adamw":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, ARS2Neo(param_groups(model), lr=1e-2, sam="adaptive")


def train(model, optimizer, steps):
    ids = torch.arange(24).view(2, 12) % 10
    losses = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    return losses


@pytest.fixture
def saved(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 3)
    store = Checkpoints(tmp_path / "checkpoint")
    return store, store.save(3, model, optimizer, {"note": "here"})


@pytest.mark.parametrize("kind", ["ars2neo", "adamw"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, kind):
    model, optimizer = build(kind=kind)
    expected = train(model, optimizer, 6)
    model, optimizer = build(kind=kind)
    assert train(model, optimizer, 3) == expected[:3]
    store = Checkpoints(tmp_path)
    path = store.save(3, model, optimizer, {"cursor": [1, 2]})
    model, optimizer = build(kind=kind)
    assert store.restore(path, model, optimizer) == {"cursor": [1, 2]}
    assert train(model, optimizer, 3) == expected[3:]


def test_it_loads_as_a_model(saved):
    model = TinyOnnForCausalLM.from_pretrained(saved[1])
    assert model.config.num_experts == 4


def test_the_newest_are_kept(tmp_path):
    model, optimizer = build()
    store = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        store.save(step, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000015"]
    assert store.latest().name == "step-000015"
    store.clear()
    assert store.latest() is None


def test_an_unfinished_one_is_never_picked_up_and_cleaned_away(saved):
    store, path = saved
    leftover = store.folder / "unfinished-step-000009"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert store.latest() == path
    model, optimizer = build()
    store.save(4, model, optimizer, {})
    assert [p.name for p in store.folder.iterdir()] == ["step-000004"]


@pytest.mark.parametrize("moment", ["save_file", "_sync"])
def test_a_full_disk_leaves_the_old_one_and_no_rubbish(saved, monkeypatch, moment):
    store, path = saved

    def full(*words, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, moment, full)
    with pytest.raises(OSError, match="No space left"):
        store.save(4, *build(), {})
    assert [p.name for p in store.folder.iterdir()] == [path.name]
    monkeypatch.undo()
    store.restore(path, *build())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "pickle"])
def test_a_damaged_file_is_refused_by_name(saved, name, damage):
    store, path = saved
    file = path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.write_bytes(pickle.dumps({"weights": 1}))
    model, optimizer = build()
    before = model.state_dict()["lm_head.weight"].clone()
    with pytest.raises(CheckpointError, match=name):
        store.restore(path, model, optimizer)
    assert torch.equal(model.state_dict()["lm_head.weight"], before)


def test_a_pickle_that_names_itself_right_is_not_run(saved):
    """Even with a checksum that fits, what is no safetensors file is not read as anything else."""
    store, path = saved
    file = path / "optimizer.safetensors"
    file.write_bytes(pickle.dumps({"weights": 1}))
    kept = json.loads((path / "trainer.json").read_text())
    kept["checksums"][file.name] = module._checksum(file)
    (path / "trainer.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        store.restore(path, *build())


def test_another_model_is_refused_by_parameter(saved):
    store, path = saved
    with pytest.raises(CheckpointError, match=r"of another model: .* is \(.*32\), expected"):
        store.restore(path, *build(hidden=64))
    with pytest.raises(CheckpointError, match="of another model"):
        store.restore(path, *build(experts=8))


@pytest.mark.parametrize("text", ["{", "[]", '{"state": {}}'])
def test_a_spoilt_description_is_refused(saved, text):
    store, path = saved
    (path / "trainer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer.json: not"):
        store.restore(path, *build())
