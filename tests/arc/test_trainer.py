"""The training step: it learns, it repeats itself, and it survives what is not finite."""

import copy
import math

import pytest
import torch

from tiny_onn.arc import load_tasks
from tiny_onn.arc.batches import BatchConfig, DemonstrationStream
from tiny_onn.arc.trainer import ARCTrainer
from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.optim import ARS2Neo, param_groups
from tiny_onn.shaping import RoutingShaper


@pytest.fixture(scope="module")
def tasks():
    return list(load_tasks("arcagi", max_cells=9))[:4]


def build(tasks, sam="off", dropout=0.0, shaping="fars", **options):
    torch.manual_seed(0)
    config = TinyOnnConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=32,
        num_tasks=len(tasks),
        hidden_dropout=dropout,
    )
    model = TinyOnnForCausalLM(config)
    optimizer = ARS2Neo(param_groups(model, lr=0.02, adam_lr=0.005), sam=sam)
    shaper = RoutingShaper(model, shaping)
    stream = DemonstrationStream(tasks, BatchConfig(batch_tokens=512), seed=0)
    return ARCTrainer(model, optimizer, shaper, **options), stream


def test_the_loss_falls_by_more_than_half(tasks):
    trainer, stream = build(tasks)
    results = [trainer.train_step(stream.next_batch()) for _ in range(60)]
    assert results[-1].loss < 0.5 * results[0].loss
    assert results[-1].accuracy > results[0].accuracy + 0.2


@pytest.mark.parametrize("sam", ["off", "adaptive"])
def test_the_same_seed_gives_the_same_losses(tasks, sam):
    runs = []
    for _ in range(2):
        trainer, stream = build(tasks, sam, dropout=0.2)
        runs.append([trainer.train_step(stream.next_batch()).loss for _ in range(6)])
    assert runs[0] == runs[1]


def test_both_passes_see_the_shaping_loss_and_the_same_dropout(tasks):
    trainer, stream = build(tasks, "sync", dropout=0.5)
    calls = []
    original = trainer.shaper.calculate_meta_loss

    def counted(*inputs):
        loss = original(*inputs)
        calls.append((float(loss.detach()), loss.requires_grad))
        return loss

    trainer.shaper.calculate_meta_loss = counted
    masks = []
    layer = trainer.model.model.layers[0]
    drop = layer._drop

    def noted(x):
        dropped = drop(x)
        masks.append(dropped == 0)
        return dropped

    layer._drop = noted
    result = trainer.train_step(stream.next_batch())
    assert result.passes == 2 and len(calls) == 2
    assert all(value != 0 and has_gradient for value, has_gradient in calls)
    assert calls[0][0] != calls[1][0], "the second pass is at perturbed weights"
    assert len(masks) == 4
    # The odd zero is one that the layer itself computed.
    assert all((a != b).float().mean() < 1e-4 for a, b in zip(masks[:2], masks[2:], strict=True))


def test_padding_does_not_count_in_the_shaping(tasks):
    trainer, stream = build(tasks)
    batch = stream.next_batch()
    assert (batch.segment_ids < 0).any()
    seen = []
    trainer.shaper.strategies["fars"].loss = lambda routes: (
        seen.extend(len(x) for x in routes.logits) or routes.logits[0].sum() * 0
    )
    trainer.train_step(batch)
    assert set(seen) == {batch.real_tokens}


@pytest.mark.parametrize("sam", ["off", "sync"])
def test_a_loss_that_is_not_finite_changes_nothing(tasks, sam):
    trainer, stream = build(tasks, sam)
    trainer.train_step(stream.next_batch())
    before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    trainer.shaper.w_meta = math.nan
    result = trainer.train_step(stream.next_batch())
    assert result.skipped and math.isnan(result.loss)
    after = (trainer.model.state_dict(), trainer.optimizer.state_dict())
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name])
    for index, entry in before[1]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, after[1]["state"][index][name])
    trainer.shaper.w_meta = 0.1
    assert not trainer.train_step(stream.next_batch()).skipped


def test_routes_are_described(tasks):
    trainer, stream = build(tasks)
    trainer.train_step(stream.next_batch())
    figures = trainer.routing()
    assert 0 < figures.routing_entropy <= 1 and 0 < figures.load_entropy <= 1
    assert 0.25 <= figures.top_share <= 0.5, "an expert is chosen at most once by a token, K = 2"


def test_clipping_bounds_the_gradient(tasks):
    trainer, stream = build(tasks, clip=1e-3)
    result = trainer.train_step(stream.next_batch())
    norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    assert result.grad_norm > 1e-2
    assert torch.stack(norms).norm() == pytest.approx(1e-3, rel=1e-3)
