"""What an optimizer's step costs: ARS2-Neo beside AdamW, Muon, and itself one matrix at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiny_onn.arc.recipe import OptimizerRecipe, Recipe
from tiny_onn.arc.tasks import Task
from tiny_onn.arc.training import TrainingRun
from tiny_onn.benchmarks.timing import alternate, take_turns
from tiny_onn.optim import ARS2Neo, orthogonalize, param_groups

Step = Callable[[], object]

SMALL = [(64, 64)] * 24 + [(16, 32, 32)] * 8
LARGE = [(256, 256)] * 24 + [(16, 32, 32)] * 8


def bench_optim(
    recipe: Recipe, tasks: Sequence[Task], *, rounds: int = 50, steps: int = 30
) -> dict[str, Any]:
    """Milliseconds of one step of each optimizer, and of a training step in each SAM mode.

    Args:
        recipe: the demo's; its model's parameters are case ``c``.
        tasks: what the training step trains on.
        rounds: timed steps of each optimizer; steps: timed training steps of each mode.

    Returns:
        ``a`` (24 matrices 64x64 and 8 stacks of 16 32x32), ``b`` (24 of 256x256 instead) and
        ``c`` (the recipe's model), each with ``adamw_ms, muon_ms, ars2neo_ms, ars2neo_loop_ms,
        ars2neo_sync_ms, ars2neo_over_muon, ars2neo_over_loop``; and ``step`` with ``off_ms,
        sync_over_off, adaptive_over_off, sync_rate``.
    """
    torch.manual_seed(recipe.seed)
    model = recipe.model.build(len(tasks), recipe.seed)
    cases = {
        "a": lambda: [{"params": _parameters(SMALL), "orthogonal": True}],
        "b": lambda: [{"params": _parameters(LARGE), "orthogonal": True}],
        "c": lambda: _copied(param_groups(model)),
    }
    result: dict[str, Any] = {name: bench_case(groups, rounds) for name, groups in cases.items()}
    return result | {"step": bench_step(recipe, tasks, steps)}


def bench_case(groups: Callable[[], list[dict[str, Any]]], rounds: int) -> dict[str, float]:
    """Milliseconds of one step of every optimizer on equal parameters and gradients.

    Args:
        groups: makes fresh parameters in the two tracks of ARS2-Neo.
        rounds: timed steps of each.
    """
    seconds = alternate(
        {name: make(groups()) for name, make in CANDIDATES.items()}, rounds=rounds, warmup=5
    )
    result = {f"{name}_ms": 1e3 * s for name, s in seconds.items()}
    result["ars2neo_over_muon"] = seconds["ars2neo"] / seconds["muon"]
    result["ars2neo_over_loop"] = seconds["ars2neo"] / seconds["ars2neo_loop"]
    return result


def bench_step(recipe: Recipe, tasks: Sequence[Task], steps: int) -> dict[str, float]:
    """A real training step without, with, and with adaptive sharpness-aware passes.

    The adaptive step's time is that of its steps with one and with two passes, each by its median,
    weighed by the rate at which they came, so that a busy moment doesn't pass for a pass.
    """
    runs = {mode: _training(recipe, tasks, mode) for mode in ("off", "sync", "adaptive")}
    passes: list[int] = []

    def train(mode: str) -> None:
        run = runs[mode]
        result = run.trainer.train_step(run.stream.next_batch())
        if mode == "adaptive":
            passes.append(result.passes)

    warmup = 3
    calls: dict[str, Step] = {mode: (lambda mode=mode: train(mode)) for mode in runs}  # type: ignore[misc]
    seconds = take_turns(calls, rounds=steps, warmup=warmup)
    off, sync = (statistics.median(seconds[mode]) for mode in ("off", "sync"))
    timed = list(zip(passes[warmup:], seconds["adaptive"], strict=True))
    adaptive = 0.0
    for count in (1, 2):
        took = [s for n, s in timed if n == count]
        adaptive += len(took) / len(timed) * statistics.median(took) if took else 0.0
    return {
        "off_ms": 1e3 * off,
        "sync_over_off": sync / off,
        "adaptive_over_off": adaptive / off,
        "sync_rate": sum(n == 2 for n, _ in timed) / len(timed),
    }


def _training(recipe: Recipe, tasks: Sequence[Task], mode: Any) -> TrainingRun:
    settings = OptimizerRecipe(**(vars(recipe.optimizer) | {"sam": mode}))
    return TrainingRun(tasks, Recipe(**(vars(recipe) | {"optimizer": settings})))


# The candidates: each takes groups in ARS2-Neo's two tracks and returns a step without arguments.


def _adamw(groups: list[dict[str, Any]]) -> Step:
    return torch.optim.AdamW(_with_gradients(groups)).step


def _muon(groups: list[dict[str, Any]]) -> Step:
    """torch's Muon on matrices, each expert a matrix of its own; AdamW on the rest."""
    matrices, rest = _matrices(groups)
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest))
    return lambda: [optimizer.step() for optimizer in optimizers]


def _pytorch_optimizer_muon(groups: list[dict[str, Any]]) -> Step:
    from pytorch_optimizer import Muon

    matrices, rest = _matrices(groups)
    tracks = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    return Muon([track for track in tracks if track["params"]]).step


def _pytorch_optimizer_sam(groups: list[dict[str, Any]]) -> Step:
    """Both halves of SAM around AdamW, without the passes between them."""
    from pytorch_optimizer import SAM

    optimizer = SAM(_with_gradients(groups), torch.optim.AdamW)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def _ars2neo(groups: list[dict[str, Any]]) -> Step:
    _with_gradients(groups)
    return ARS2Neo(groups, ns_dtype="auto").step


def _ars2neo_loop(groups: list[dict[str, Any]]) -> Step:
    """The same, orthogonalising one matrix after the other."""
    _with_gradients(groups)

    def one_by_one(x: Tensor) -> Tensor:
        return torch.stack([orthogonalize(matrix, dtype="auto") for matrix in x])

    return ARS2Neo(groups, newton_schulz=one_by_one).step


def _ars2neo_sync(groups: list[dict[str, Any]]) -> Step:
    """Both halves of ARS2-Neo's own SAM, without the passes between them."""
    _with_gradients(groups)
    optimizer = ARS2Neo(groups, ns_dtype="auto", sam="sync")

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


CANDIDATES: dict[str, Callable[[list[dict[str, Any]]], Step]] = {
    "adamw": _adamw,
    "muon": _muon,
    "ars2neo": _ars2neo,
    "ars2neo_loop": _ars2neo_loop,
    "ars2neo_sync": _ars2neo_sync,
}
if find_spec("pytorch_optimizer") is not None:
    CANDIDATES |= {
        "pytorch_optimizer_muon": _pytorch_optimizer_muon,
        "pytorch_optimizer_sam": _pytorch_optimizer_sam,
    }


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5) for shape in shapes]


def _copied(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        group | {"params": [nn.Parameter(p.detach().clone()) for p in group["params"]]}
        for group in groups
    ]


def _with_gradients(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    parameters = [p for group in groups for p in group["params"]]
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def _matrices(groups: list[dict[str, Any]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All matrices of the orthogonal track one by one, and the parameters of the other track."""
    _with_gradients(groups)
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for group in groups:
        for p in group["params"]:
            if not group["orthogonal"]:
                rest.append(p)
                continue
            assert p.grad is not None
            flat = p.detach().reshape(-1, *p.shape[-2:])
            for matrix, gradient in zip(flat, p.grad.reshape(flat.shape), strict=True):
                matrices.append(nn.Parameter(matrix.clone()))
                matrices[-1].grad = gradient.clone()
    return matrices, rest
