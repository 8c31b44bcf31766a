"""Attention in causal blocks equals plain attention, and is taken only where it may be."""

import pytest
import torch

from tiny_onn.models import causal_blocks
from tiny_onn.models.attention import (
    eager_attention_forward,
    packed_causal_mask,
    sdpa_attention_forward,
)
from tiny_onn.models.causal_blocks import attention_in_blocks, blocks_pay


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(causal_blocks, "BLOCK", 4)


def inputs(heads=4, groups=2, length=11, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, width)] + 2 * [(2, groups, length, width)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(query, key, value):
    length = query.shape[2]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    module = torch.nn.Module().train()
    return eager_attention_forward(module, query, key, value, mask, scaling=0.3)[0]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_equal_plain_attention_forward_and_backward(small_blocks, groups, length):
    leaves = inputs(groups=groups, length=length)
    ours, theirs = attention_in_blocks(*leaves, 0.3), plain(*leaves)
    torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), leaves),
        torch.autograd.grad((theirs * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_a_mask_hides_more(small_blocks):
    leaves = inputs(dtype=torch.float32)
    segments = torch.tensor([[0] * 3 + [1] * 6 + [-1] * 2, [0] * 11])
    found = sdpa_attention_forward(
        torch.nn.Module(), *leaves, packed_causal_mask(segments, False), scaling=0.3
    )[0]
    additive = packed_causal_mask(segments, True)
    theirs = eager_attention_forward(torch.nn.Module().eval(), *leaves, additive, scaling=0.3)[0]
    torch.testing.assert_close(found, theirs)
    assert not torch.allclose(found[0], attention_in_blocks(*leaves, 0.3)[0])
    for got, expected in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_the_gradient_is_exact(small_blocks):
    assert torch.autograd.gradcheck(lambda *x: attention_in_blocks(*x, 0.3), inputs(length=6))


def test_inputs_may_be_views(small_blocks):
    query, key, value = inputs()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(
        attention_in_blocks(*views, 0.3), attention_in_blocks(query, key, value, 0.3)
    )


def test_bfloat16_keeps_its_dtype_and_is_near(small_blocks):
    leaves = inputs(dtype=torch.bfloat16)
    read = attention_in_blocks(*leaves, 0.3)
    assert read.dtype == torch.bfloat16
    expected = plain(*(x.double() for x in leaves))
    # Scores and weights are rounded to 8 bits, as in plain attention.
    torch.testing.assert_close(read.double(), expected, rtol=0, atol=0.03)
    grads = torch.autograd.grad(read.float().sum(), leaves)
    assert {g.dtype for g in grads} == {torch.bfloat16}


def test_blocks_are_for_causal_training_on_a_cpu_only(small_blocks):
    query, key, _ = inputs()
    assert blocks_pay(query, key, None, 0.0)
    assert not blocks_pay(query, key, torch.zeros(1), 0.0)
    assert not blocks_pay(query, key, None, 0.1)
    assert not blocks_pay(query.detach(), key, None, 0.0)
    assert not blocks_pay(query[:, :, :4], key[:, :, :4], None, 0.0)
    assert not blocks_pay(query[:, :, :6], key, None, 0.0)


def test_sdpa_takes_the_blocks_and_agrees_with_itself(small_blocks, monkeypatch):
    leaves = inputs(dtype=torch.float32)
    module = torch.nn.Module().train()
    module.is_causal = True
    module.num_key_value_groups = 2
    called = []
    monkeypatch.setattr(
        "tiny_onn.models.attention.attention_in_blocks",
        lambda *x: called.append(x) or attention_in_blocks(*x),
    )
    blocks, _ = sdpa_attention_forward(module, *leaves, None, scaling=0.3)
    assert called
    whole, _ = sdpa_attention_forward(module, *(x.detach() for x in leaves), None, scaling=0.3)
    assert len(called) == 1
    torch.testing.assert_close(blocks, whole)
