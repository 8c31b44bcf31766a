"""Training: it learns, and checkpointing its activations changes nothing."""

from __future__ import annotations

import pytest
import torch
from model_helpers import MakeModel, MakeTokens, enable_checkpointing
from torch import Tensor

from tiny_onn.models import TinyOnnForCausalLM
from tiny_onn.routing import ROUTERS


@pytest.mark.parametrize(
    ("router", "position_type"), [*((name, "grid") for name in ROUTERS), ("mlp", "sequence")]
)
def test_a_small_batch_is_learnt_by_heart(
    make_model: MakeModel, make_tokens: MakeTokens, router: str, position_type: str
) -> None:
    model = make_model(router=router, position_type=position_type).train()
    ids = make_tokens(4, 24)
    # Four sequences start alike: the task tells them apart.
    tasks = torch.tensor([0, 1, 2, 0])
    ids[3] = ids[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cooldown = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(ids, task_ids=tasks, labels=ids).loss
        loss.backward()
        optimizer.step()
        cooldown.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.1
    model.eval()
    answer = model.generate(
        ids[:, :1], task_ids=tasks, max_new_tokens=23, do_sample=False, eos_token_id=-1
    )
    assert answer.tolist() == ids.tolist()


def test_gradients_reach_every_parameter(make_model: MakeModel, make_tokens: MakeTokens) -> None:
    model = make_model(num_key_value_heads=1).train()
    ids = make_tokens(4, 24)
    tasks, symmetries = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 3, 7, 1])
    model(ids, labels=ids, task_ids=tasks, symmetry_ids=symmetries).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_neither_gradients_nor_router_logits(
    make_model: MakeModel, make_tokens: MakeTokens, dropout: float
) -> None:
    model = make_model(
        router_aux_loss_coef=0.5, hidden_dropout=dropout, attention_dropout=dropout
    ).train()
    ids = make_tokens(2, 20)

    def run(model: TinyOnnForCausalLM) -> tuple[dict[str, Tensor], tuple[Tensor, ...], int]:
        calls = []
        router = model.get_submodule("model.layers.0.mlp.router")
        hook = router.register_forward_pre_hook(lambda *_: calls.append(1))
        model.zero_grad()
        torch.manual_seed(3)
        output = model(ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        hook.remove()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return gradients, output.router_logits, len(calls)

    plain = run(model)
    enable_checkpointing(model)
    checkpointed = run(model)
    assert (plain[2], checkpointed[2]) == (1, 2)
    assert len(checkpointed[1]) == 4
    for one, other in zip(plain[1], checkpointed[1], strict=True):
        assert torch.equal(one, other) and other.requires_grad
    assert plain[0].keys() == checkpointed[0].keys()
    for name, gradient in plain[0].items():
        torch.testing.assert_close(checkpointed[0][name], gradient, rtol=0, atol=1e-7, msg=name)


def test_the_same_seed_gives_the_same_losses(
    make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    ids = make_tokens(4, 24)

    def losses() -> list[float]:
        model = make_model(hidden_dropout=0.1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses() == losses()
