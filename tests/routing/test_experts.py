"""Grouped experts against a plain double loop over tokens and their chosen experts in float64."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.routing import GroupedExperts, LinearRouter, MixtureOfExperts
from tiny_onn.routing.dispatch import dispatch, few_lengths
from tiny_onn.routing.experts import Implementation
from tiny_onn.routing.grouped import few_lengths_pay, grouped_mm_accepts

N, D, OUT, WIDTH, E = 23, 8, 12, 16, 4
Kind = Literal["linear", "swiglu"]


def make(kind: Kind, implementation: Implementation = "auto", **sizes: int) -> GroupedExperts:
    widths = {"num_experts": E, "hidden_size": D, "output_size": OUT, "intermediate_size": WIDTH}
    widths |= sizes
    return GroupedExperts(
        widths["num_experts"],
        widths["hidden_size"],
        widths["output_size"],
        widths["intermediate_size"] if kind == "swiglu" else None,
        implementation,
    )


def double_loop(
    parameters: dict[str, Tensor], x: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for n in range(len(x)):
        mixed = torch.zeros((), dtype=x.dtype)
        for k, e in enumerate(indices[n].tolist()):
            if "proj" in parameters:
                y = parameters["proj"][e] @ x[n]
            else:
                hidden = parameters["gate_up_proj"][e] @ x[n]
                gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
                y = parameters["down_proj"][e] @ (gate * torch.sigmoid(gate) * up)
            mixed = mixed + weights[n, k] * y
        rows.append(mixed)
    return torch.stack(rows)


def choices(pattern: str, top_k: int) -> Tensor:
    """Chosen experts ``[N, K]``, different ones for each token."""
    torch.manual_seed(7)
    if pattern == "spread":
        return torch.rand(N, E).topk(top_k).indices
    if pattern == "empty experts":  # experts 0 and 2 get nothing
        return torch.tensor([1, 3]).repeat(N, 1)[:, :top_k]
    if pattern == "one takes all":
        return torch.full((N, 1), 2).expand(N, top_k)
    raise AssertionError(pattern)


def outputs_and_gradients(
    experts: GroupedExperts, x: Tensor, indices: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """What the experts give and what flows back, for an upstream gradient that is not even."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    y = experts(x, indices, weights)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


def reference(
    experts: GroupedExperts, x: Tensor, indices: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    leaves = {
        name: t.detach().double().requires_grad_()
        for name, t in {"x": x, "weights": weights, **dict(experts.named_parameters())}.items()
    }
    parameters = {name: t for name, t in leaves.items() if name not in ("x", "weights")}
    y = double_loop(parameters, leaves["x"], indices, leaves["weights"])
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


CASES = [
    ("spread", 1),
    ("spread", 2),
    ("spread", E),
    ("empty experts", 2),
    ("one takes all", 1),
]


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("implementation", ["grouped", "dense", "loop", "auto"])
@pytest.mark.parametrize(("pattern", "top_k"), CASES)
def test_experts_equal_a_double_loop(
    kind: Kind, implementation: Implementation, pattern: str, top_k: int
) -> None:
    experts = make(kind, implementation)
    indices = choices(pattern, top_k)
    x, weights = torch.randn(N, D), torch.randn(N, top_k).softmax(-1)
    found = outputs_and_gradients(experts, x, indices, weights)
    for name, expected in reference(experts, x, indices, weights).items():
        # Sums of some tens of products of order one in float32.
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 5, "output_size": 3}])
def test_float64_is_exact_to_float64(kind: Kind, sizes: dict[str, int]) -> None:
    experts = make(kind, "auto", **sizes).double()
    indices = choices("spread", 2)
    x = torch.randn(N, experts.hidden_size, dtype=torch.float64)
    weights = torch.rand(N, 2, dtype=torch.float64)
    found = outputs_and_gradients(experts, x, indices, weights)
    for name, expected in reference(experts, x, indices, weights).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_gradcheck() -> None:
    experts = make("swiglu", hidden_size=3, output_size=2, intermediate_size=2).double()
    indices = torch.tensor([[0, 3], [3, 1], [1, 0]])

    def call(x: Tensor, weights: Tensor, *parameters: Tensor) -> Any:
        named = dict(zip(("gate_up_proj", "down_proj"), parameters, strict=True))
        return torch.func.functional_call(experts, named, (x, indices, weights))

    x, weights = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(call, (x, weights, *experts.parameters()))


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("implementation", ["grouped", "dense", "loop"])
def test_no_tokens_at_all(kind: Kind, implementation: Implementation) -> None:
    experts = make(kind, implementation)
    x = torch.zeros(0, D, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, OUT)
    y.sum().backward()
    # The graph stays whole, so that a rank without tokens still takes part in a reduction.
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 6}, {"output_size": 9}, {"intermediate_size": 5}]
)
def test_widths_off_the_stride_are_computed_by_the_loop(sizes: dict[str, int]) -> None:
    experts = make("swiglu", "auto", **sizes)
    indices, weights = choices("spread", 2), torch.rand(N, 2)
    x = torch.randn(N, experts.hidden_size)
    found = outputs_and_gradients(experts, x, indices, weights)
    for name, expected in reference(experts, x, indices, weights).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=2e-5, msg=name)
    stubborn = make("swiglu", "grouped", **sizes)
    width = next(iter(sizes.values()))
    with pytest.raises(
        ValueError, match=rf"implementation='grouped' needs .* 16 bytes.*\b{width}\b"
    ):
        stubborn(x, indices, weights)


def test_grouped_refuses_float64_by_name() -> None:
    experts = make("linear", "grouped").double()
    with pytest.raises(ValueError, match="implementation='grouped' needs .*Got torch.float64"):
        experts(torch.randn(2, D).double(), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_what_grouped_mm_accepts() -> None:
    assert grouped_mm_accepts(torch.float32, 4, 8)
    assert not grouped_mm_accepts(torch.float32, 4, 6)
    assert not grouped_mm_accepts(torch.bfloat16, 4)
    assert grouped_mm_accepts(torch.bfloat16, 8)
    assert not grouped_mm_accepts(torch.float64, 8)


@pytest.mark.parametrize("kind", ["linear", "swiglu"])
@pytest.mark.parametrize("implementation", ["auto", "dense", "loop"])
@pytest.mark.parametrize("tokens", [N, 300])
def test_bfloat16_autocast_is_near(kind: Kind, implementation: Implementation, tokens: int) -> None:
    """Also with so many tokens that the experts' runs are filled up."""
    experts = make(kind, implementation, output_size=16)
    indices = torch.rand(tokens, E).topk(2).indices
    x, weights = torch.randn(tokens, D), torch.randn(tokens, 2).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(experts, x, indices, weights)
    assert found["y"].dtype == torch.bfloat16
    for name, expected in reference(experts, x, indices, weights).items():
        assert found[name].dtype == (torch.bfloat16 if name == "y" else torch.float32), name
        error = (found[name].double() - expected).norm() / expected.norm()
        # bfloat16 keeps 8 bits, 0.4 % a rounding, and a handful of roundings follow each other.
        assert error < 0.02, (name, error)


def test_parameters_of_autocast_experts_stay_float32_in_their_gradient() -> None:
    experts = make("swiglu", output_size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts(torch.randn(N, D), choices("spread", 2), torch.rand(N, 2)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())


def test_the_mixture_is_one_softmax_of_the_raw_logits() -> None:
    torch.manual_seed(0)
    router = LinearRouter(D, E)
    mixture = MixtureOfExperts(router, make("linear"), 2)
    x = torch.randn(2, 3, D)
    logits = x @ router.weight.T
    chosen, indices = logits.topk(2)
    weights = chosen.exp() / chosen.exp().sum(-1, keepdim=True)
    per_expert = torch.einsum("eod,btd->bteo", mixture.experts.proj, x)
    picked = per_expert.gather(2, indices[..., None].expand(-1, -1, -1, OUT))
    torch.testing.assert_close(mixture(x), (weights[..., None] * picked).sum(2))
    assert mixture(x).shape == (2, 3, OUT)
    assert mixture(x[0, 0]).shape == (OUT,)


@pytest.mark.parametrize("top_k", [0, E + 1])
def test_a_mixture_refuses_an_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok must .* num_experts=4. Got {top_k}"):
        MixtureOfExperts(LinearRouter(D, E), make("linear"), top_k)


def test_the_router_learns_through_the_mixture() -> None:
    """Expert 0 is right and expert 1 is wrong: the router comes to prefer expert 0."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(LinearRouter(D, 2), make("linear", num_experts=2, output_size=D), 2)
    with torch.no_grad():
        mixture.experts.proj.copy_(torch.stack([torch.eye(D), -torch.eye(D)]))
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=0.05)
    x = torch.randn(64, D).abs()
    before = mixture.router(x).softmax(-1)[:, 0].mean()
    for _ in range(40):
        optimizer.zero_grad()
        F.mse_loss(mixture(x), x).backward()
        optimizer.step()
    after = mixture.router(x).softmax(-1)[:, 0].mean()
    assert after > 0.9 > before


def test_dispatch_sorts_pairs_by_expert_and_keeps_the_tokens_order() -> None:
    indices = torch.tensor([[2, 0], [0, 3], [2, 3]])
    plan = dispatch(indices, 4)
    assert plan.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert plan.offsets.tolist() == [2, 2, 4, 6]
    assert plan.offsets.dtype == torch.int32
    assert plan.slot.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_filled_runs_have_few_lengths() -> None:
    indices = torch.randn(300, E).mul(torch.arange(1, E + 1)).topk(2).indices
    plain, filled = dispatch(indices, E), dispatch(indices, E, filled=True)
    runs = [torch.diff(plan.offsets, prepend=plan.offsets.new_zeros(1)) for plan in (plain, filled)]
    assert torch.equal(runs[1], few_lengths(runs[0])) and not torch.equal(*runs)
    assert len(filled.token) == filled.offsets[-1]
    # Each pair still stands in the run of its expert, and there with its token.
    expert = torch.searchsorted(filled.offsets, filled.slot.int(), right=True)
    assert torch.equal(expert, indices)
    assert torch.equal(filled.token[filled.slot], torch.arange(300)[:, None].expand(300, 2))
    assert filled.slot.flatten().unique().numel() == 600


def test_few_lengths_are_few_and_little_longer() -> None:
    counts = torch.arange(4097)
    lengths = few_lengths(counts)
    assert torch.equal(lengths[:33], counts[:33])
    assert (lengths >= counts).all() and (16 * (lengths - counts) < counts.clamp(min=1)).all()
    assert len(lengths.unique()) == 33 + 16 * 7
    assert torch.equal(few_lengths(lengths), lengths)


def test_lengths_are_few_where_products_are_compiled_one_by_one() -> None:
    assert few_lengths_pay(torch.bfloat16, torch.device("cpu"))
    assert not few_lengths_pay(torch.float32, torch.device("cpu"))
    assert not few_lengths_pay(torch.bfloat16, torch.device("meta"))


@pytest.mark.parametrize("name", ["num_experts", "hidden_size", "output_size", "intermediate_size"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1. Got 0"):
        make("swiglu", "auto", **{name: 0})


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="one of 'auto', 'grouped', 'dense', 'loop'. Got 'fast'"):
        GroupedExperts(2, 4, implementation="fast")  # type: ignore[arg-type]
