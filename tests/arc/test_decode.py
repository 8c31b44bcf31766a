"""Decoding: the cache, the batch and the padding change nothing; views are undone rightly."""

import math

import numpy as np
import pytest
import torch

from tiny_onn.arc import load_tasks, tokens
from tiny_onn.arc.decode import DecodeConfig, decode, log_likelihoods, make_prompts
from tiny_onn.models import TinyOnnConfig, TinyOnnForCausalLM


@pytest.fixture(scope="module")
def tasks():
    return load_tasks("arcagi", ids=["25ff71a9", "b1948b0a", "f76d97a5"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TinyOnnConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=32
    )
    config.num_tasks = 3
    model = TinyOnnForCausalLM(config)
    # An untrained model hardly ever ends a grid; a nudge gives answers of all lengths.
    nudge = torch.zeros(tokens.VOCAB_SIZE)
    nudge[[tokens.ROW_END, tokens.END]] = 4.0
    model.lm_head.register_forward_hook(lambda module, args, logits: 6 * logits + nudge)
    return model


class Copier(torch.nn.Module):
    """A stand-in that answers every prompt with its own input, token by token."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "model", self)  # not as a submodule of itself

    def token_positions(self, ids):
        return torch.zeros(3, *ids.shape, dtype=torch.long)

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, tokens.VOCAB_SIZE)
        for row, ids in enumerate(input_ids.tolist()):
            begin, turn = ids.index(tokens.INPUT), ids.index(tokens.OUTPUT)
            wanted = [*ids[begin + 1 : turn], tokens.END]
            logits[row, -1, wanted[min(len(ids) - turn - 1, len(wanted) - 1)]] = 50.0
        return type("Output", (), {"logits": logits[:, -1:]})


def answers(decoded):
    return [(None if d.grid is None else d.grid.tolist(), round(d.log_prob, 3)) for d in decoded]


def test_every_view_is_undone(tasks):
    config = DecodeConfig(views=24)
    prompts = make_prompts(tasks, config, seed=0)
    decoded = decode(Copier(), prompts, config, use_cache=False)
    assert len(decoded) == 24 * sum(len(task.test) for task in tasks)
    for answer in decoded:
        expected = tasks[answer.prompt.task].test[answer.prompt.test].input
        assert answer.grid is not None and np.array_equal(answer.grid, expected)
        assert answer.log_prob == pytest.approx(0.0, abs=1e-6)


def test_cache_batch_and_padding_change_nothing(tasks, model):
    config = DecodeConfig(views=8, hopeless=60.0)
    prompts = make_prompts(tasks, config, seed=0)
    together = answers(decode(model, prompts, config))
    assert answers(decode(model, prompts, config, use_cache=False)) == together
    one_by_one = DecodeConfig(views=8, hopeless=60.0, batch_tokens=1)
    assert answers(decode(model, prompts, one_by_one)) == together
    assert len({str(grid) for grid, _ in together}) > 2


def test_an_answer_that_never_ends_is_given_up(tasks, model):
    config = DecodeConfig(views=2, hopeless=3.0)
    decoded = decode(model, make_prompts(tasks, config, seed=0), config)
    assert all(d.log_prob == -math.inf for d in decoded if d.grid is None)
    assert any(d.grid is None for d in decoded)


def test_the_log_probability_is_that_of_the_answer(tasks, model):
    config = DecodeConfig(views=4, hopeless=200.0)
    decoded = [
        d for d in decode(model, make_prompts(tasks, config, seed=0), config) if d.grid is not None
    ]
    assert decoded
    scores = log_likelihoods(model, [d.prompt for d in decoded], [d.grid for d in decoded], 4096)
    assert scores == pytest.approx([d.log_prob for d in decoded], abs=1e-3)


def test_prompts_show_nothing_but_the_test_input_unless_asked(tasks):
    plain = make_prompts(tasks, DecodeConfig(views=3), seed=0)
    assert all((p.ids == tokens.OUTPUT).sum() == 1 and p.ids[-1] == tokens.OUTPUT for p in plain)
    context = make_prompts(tasks, DecodeConfig(views=3, context_pairs=2), seed=0)
    assert all((p.ids == tokens.OUTPUT).sum() == 3 for p in context)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="views must be at least 1. Got 0"):
        DecodeConfig(views=0)
