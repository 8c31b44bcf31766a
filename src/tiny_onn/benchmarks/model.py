"""How fast our model is: beside transformers' Qwen3-MoE, a dense model, and a plain loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn

from tiny_onn.benchmarks import peers
from tiny_onn.benchmarks.peers import Size
from tiny_onn.benchmarks.timing import alternate, take_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = ("eager", "sdpa")
EXPERTS = (4, 8, 16, 32, 64)
WARMUP = 6
"""Calls before those that are timed: in bfloat16 the first ones compile products of new shapes."""
DECODE_ROWS, DECODE_PROMPT, DECODE_TOKENS = 32, 16, 64

MODELS: dict[str, Callable[[Size], nn.Module]] = {
    "ours": peers.ours,
    "loop": lambda size: peers.ours(size, "loop"),
    "qwen3_moe": peers.qwen3_moe,
    "dense": peers.dense,
}


def bench_model(
    *, rounds: int = 7, compiled: bool = False, sizes: Mapping[str, Size] = peers.SIZES
) -> dict[str, Any]:
    """Tokens a second of every model, training and forward, in float32 and bfloat16.

    All models of a size but the loop take turns. Weights are float32; bfloat16 is autocast, as the
    project trains. A training step is forward, loss and backward, without an optimizer. Every model
    has the attention implementation that is the quicker for it.

    Args:
        rounds: timed calls of each.
        compiled: compile all of them with ``torch.compile``.
        sizes: by name.

    Returns:
        ``{size: {dtype: {"train": …, "forward": …, "attention": …, "expert_scaling": …,
        "decode_tokens_per_s": …}}, "matmul_peak_gflops": {dtype: …}}``.
    """
    peaks = {name: matmul_peak(dtype) for name, dtype in DTYPES.items()}
    result: dict[str, Any] = {
        name: {dtype: bench_size(size, dtype, peaks[dtype], rounds, compiled) for dtype in DTYPES}
        for name, size in sizes.items()
    }
    return result | {"matmul_peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()}}


def bench_size(size: Size, dtype: str, peak: float, rounds: int, compiled: bool) -> dict[str, Any]:
    """All figures of one size in one dtype; ``peak`` in floating-point operations a second."""
    models = {name: _quicker(make(size), size, dtype) for name, make in MODELS.items()}
    attention = {name: str(model.config._attn_implementation) for name, model in models.items()}  # type: ignore[union-attr]
    flops = peers.forward_flops(models["ours"], size)
    if compiled:
        models = {name: torch.compile(model) for name, model in models.items()}  # type: ignore[misc]
    result: dict[str, Any] = {}
    for kind, passes in (("train", 3), ("forward", 1)):
        calls = {name: _call(model, size, dtype, kind) for name, model in models.items()}
        # The loop's many shapes would drive the compiled products of the others from their cache.
        loop = {"loop": calls.pop("loop")}
        seconds = alternate(calls, rounds=rounds, warmup=WARMUP) | alternate(loop, rounds=rounds)
        tokens = size.batch * size.tokens
        result[kind] = {f"{name}_tokens_per_s": tokens / s for name, s in seconds.items()} | {
            "ours_over_qwen3_moe": seconds["qwen3_moe"] / seconds["ours"],
            "ours_over_dense": seconds["dense"] / seconds["ours"],
            "matmul_efficiency": passes * flops / seconds["ours"] / peak,
        }
    result["attention"] = attention
    result["expert_scaling"] = expert_scaling(size, dtype, rounds)
    return result | decoding(size, dtype)


def expert_scaling(size: Size, dtype: str, rounds: int) -> dict[str, float]:
    """Tokens a second of a training step by number of experts, the chosen ones fixed."""
    calls = {
        str(experts): _call(
            _quicker(peers.ours(replace(size, experts=experts)), size, dtype),
            size,
            dtype,
            "train",
        )
        for experts in EXPERTS
        if experts >= size.chosen
    }
    tokens = size.batch * size.tokens
    seconds = alternate(calls, rounds=rounds, warmup=WARMUP)
    return {experts: tokens / s for experts, s in seconds.items()}


def decoding(size: Size, dtype: str) -> dict[str, float]:
    """Tokens a second of greedy ``generate()`` with cache, ours and Qwen3-MoE's."""
    generator = torch.Generator().manual_seed(0)
    shape = (DECODE_ROWS, DECODE_PROMPT)
    prompt = torch.randint(peers.VOCABULARY, shape, generator=generator)

    def generate(model: Any) -> Callable[[], object]:
        def call() -> None:
            with _autocast(dtype):
                answer = model.generate(prompt, max_new_tokens=DECODE_TOKENS, do_sample=False)
            assert answer.shape[1] == DECODE_PROMPT + DECODE_TOKENS

        return call

    names = {"ours": "decode_tokens_per_s", "qwen3_moe": "qwen3_moe_decode_tokens_per_s"}
    calls = {name: generate(MODELS[name](size).eval()) for name in names}
    seconds = alternate(calls, rounds=3, warmup=1)
    return {key: DECODE_ROWS * DECODE_TOKENS / seconds[name] for name, key in names.items()}


def matmul_peak(dtype: torch.dtype, width: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(width, width).to(dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: a @ b}, rounds=9)["product"]
    return 2 * width**3 / statistics.median(seconds)


def _quicker(model: Any, size: Size, dtype: str) -> nn.Module:
    """The model with the attention implementation in which it trains faster."""

    def call(attention: str) -> Callable[[], object]:
        step = _call(model, size, dtype, "train")

        def run() -> None:
            model.set_attn_implementation(attention)
            step()

        return run

    seconds = take_turns({name: call(name) for name in ATTENTION}, rounds=4, warmup=2)
    model.set_attn_implementation(min(seconds, key=lambda name: min(seconds[name])))
    return model


def _call(model: Any, size: Size, dtype: str, kind: str) -> Callable[[], object]:
    """A training step or a forward pass; every call has tokens of its own, as in training, so that
    no model finds the shapes of its products as it left them."""
    seeds = count()

    def train() -> None:
        model.train()
        model.zero_grad()
        tokens = peers.random_tokens(size, next(seeds))
        with _autocast(dtype):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    def forward() -> None:
        model.eval()
        tokens = peers.random_tokens(size, next(seeds))
        with torch.no_grad(), _autocast(dtype):
            model(input_ids=tokens, use_cache=False)

    return train if kind == "train" else forward


def _autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32")
