"""The model bench at a tiny size, and the sizes of its peers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_onn.benchmarks import model as bench
from tiny_onn.benchmarks import peers

TINY = peers.Size(32, 2, 4, 4, 2, 32, batch=2, tokens=16)
TRAIN = {"ours", "loop", "qwen3_moe", "dense"}


def numbers(nested):
    for value in nested.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def test_every_figure_is_there(monkeypatch):
    monkeypatch.setattr(bench, "DECODE_TOKENS", 4)
    monkeypatch.setattr(bench, "EXPERTS", (4, 8))
    result = bench.bench_model(rounds=1, sizes={"T": TINY})
    assert result.keys() == {"T", "matmul_peak_gflops"}
    for dtype in ("float32", "bfloat16"):
        figures = result["T"][dtype]
        assert figures.pop("attention").keys() == TRAIN
        assert figures["expert_scaling"].keys() == {"4", "8"}
        assert {"decode_tokens_per_s", "qwen3_moe_decode_tokens_per_s"} <= figures.keys()
        for kind in ("train", "forward"):
            rates = figures[kind]
            assert rates.keys() >= {f"{name}_tokens_per_s" for name in TRAIN}
            for peer in ("qwen3_moe", "dense"):
                quotient = rates["ours_tokens_per_s"] / rates[f"{peer}_tokens_per_s"]
                assert rates[f"ours_over_{peer}"] == pytest.approx(quotient)
            assert 0 < rates["matmul_efficiency"] < 1
    assert all(number > 0 for number in numbers(result))


def test_the_loop_is_the_same_model():
    torch.manual_seed(0)
    fast = peers.ours(TINY).eval()
    slow = peers.ours(TINY, "loop").eval()
    slow.load_state_dict(fast.state_dict())
    tokens = peers.random_tokens(TINY)
    torch.testing.assert_close(fast(tokens).logits, slow(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", peers.SIZES.values(), ids=peers.SIZES)
def test_peers_have_the_same_experts_and_active_parameters(size):
    ours, qwen, dense = (make(size) for make in (peers.ours, peers.qwen3_moe, peers.dense))
    stacks = [
        {
            n: tuple(p.shape)
            for n, p in model.named_parameters()
            if n.endswith("mlp.experts.down_proj")
        }
        for model in (ours, qwen)
    ]
    assert list(stacks[0].values()) == list(stacks[1].values())
    active = [peers.active_parameters(model, size) for model in (ours, qwen, dense)]
    assert active[1] == pytest.approx(active[2], rel=0.02)
    # Ours has routers of two layers, two in each block.
    routers = sum(p.numel() for n, p in ours.named_parameters() if ".router." in n)
    assert active[0] - routers == pytest.approx(active[2], rel=0.02)


def test_the_flops_are_those_that_are_counted():
    size = peers.Size(32, 2, 4, 4, 4, 32, batch=2, tokens=16)
    model = peers.ours(size, "loop").eval()
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(peers.random_tokens(size), use_cache=False)
    # Plain products compute whole rows.
    expected = peers.forward_flops(model, size, causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    attention = 2 * 32 * 2 * 2 * 16 * 32
    assert expected - peers.forward_flops(model, size) == attention * 15 // 32
