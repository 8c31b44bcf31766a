"""Does ARS2-Neo learn better? Grokking, MNIST-1D and the ARC demo, every optimizer tuned alike.

Each optimizer has the same small search, on a seed and on data that are not reported: four learning
rates, and further ones while the best lies at the edge; those with second passes start from the
best rate of their kin without, and try a few radii and half that rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_onn.studies import grokking, mnist1d
from tiny_onn.studies.arc_demo import train_and_score
from tiny_onn.studies.findings import Findings
from tiny_onn.studies.optimizer_findings import summarise
from tiny_onn.studies.optimizers import ABLATIONS, ARMS, TWO_PASS, build
from tiny_onn.studies.runs import Figures, Observer, Run, RunCache, Settings, run_all

TUNING_SEED = 100
KIN = {"sam_adamw": "adamw", "sync": "off", "adaptive": "off"}
RADII = ((0.02, 1.0), (0.1, 1.0), (0.5, 1.0), (0.1, 0.5))
"""What a two-pass optimizer tries: its radius, and its share of the kin's learning rate."""

EXTENSIONS = 3
"""How many rates are tried beyond the first four, one at a time, while the best is at the edge."""


@dataclass(frozen=True)
class Problem:
    """One thing to learn.

    Attributes:
        name: its key in the result.
        run: trains and scores.
        settings: of every run, but for arm, rate, radius, coin rate and seed.
        rates: the four learning rates of each optimizer of one pass.
        cost: what tuning makes small.
        tune, reports: settings of the tuning runs, and of each kind of reported run; a report
            named ``"equal_passes"`` is the same as ``"equal_steps"`` for optimizers of one pass.
        seeds: how many seeds are reported.
    """

    name: str
    run: Run
    settings: Settings
    rates: dict[str, tuple[float, ...]]
    cost: Callable[[Figures], Any]
    tune: Settings = field(default_factory=dict)
    reports: dict[str, Settings] = field(default_factory=lambda: {"report": {}})
    seeds: int = 3


def run_arc(settings: Settings) -> Figures:
    """One run of the ARC demo with an optimizer of the study.

    Args:
        settings: ``arm, lr, rho, coin_rate, seed, part, minutes, full``.
    """
    from tiny_onn.arc.recipe import OptimizerRecipe, ShapingRecipe

    recipe = OptimizerRecipe()
    run, figures = train_and_score(
        settings["part"],
        seed=settings["seed"],
        minutes=settings["minutes"],
        full=settings["full"],
        # Not every optimizer has the second moments that FARS reads.
        shaping=ShapingRecipe(strategy="none"),
        optimizer=lambda model: build(
            settings["arm"],
            model,
            lr=settings["lr"],
            rho=settings["rho"],
            adam_lr=recipe.adam_lr,
            weight_decay=recipe.weight_decay,
            adam_weight_decay=recipe.adam_weight_decay,
            betas=recipe.betas,
            coin_rate=settings["coin_rate"],
            seed=settings["seed"],
        ),
    )
    return figures | {"sync_rate": run.passes / run.step - 1}


def problems(full: bool, seeds: int) -> list[Problem]:
    """What is learnt, at the default sizes or the published ones."""
    rates: dict[str, tuple[float, ...]] = {
        "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
        "muon": (3e-3, 1e-2, 3e-2, 1e-1),
        "off": (1e-3, 3e-3, 1e-2, 3e-2),
    }
    grok = {"prime": 113, "share": 0.3, "epochs": 600} if full else {}
    steps = 6000 if full else 1500
    by_accuracy = mnist1d_cost
    mnist = [
        Problem(
            f"mnist1d_{model}",
            mnist1d.run,
            {"model": model, "budget": steps},
            rates,
            by_accuracy,
            tune={"part": "tune", "unit": "steps"},
            reports={
                "equal_steps": {"part": "report", "unit": "steps"},
                "equal_passes": {"part": "report", "unit": "passes"},
            },
            seeds=max(5, seeds),
        )
        for model in mnist1d.MODELS
    ]
    arc = Problem(
        "arc",
        run_arc,
        {"full": full},
        {
            "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
            "muon": (1e-2, 2e-2, 4e-2, 8e-2),
            "off": (5e-3, 1e-2, 2e-2, 4e-2),
        },
        lambda figures: figures["held_out_loss"],
        tune={"part": "tune", "minutes": 4.0 if full else 0.75},
        reports={"equal_time": {"part": "report", "minutes": 8.0 if full else 1.0}},
        seeds=seeds,
    )
    grokking_problem = Problem(
        "grokking",
        grokking.run,
        {"prime": 59, "share": 0.4, "epochs": 400} | grok,
        rates,
        grokking_cost,
        seeds=max(5, seeds),
    )
    return [grokking_problem, *mnist, arc]


def grokking_cost(figures: Figures) -> tuple[float, float]:
    """Epochs to the goal; among those that never reach it, the more accurate is the better."""
    return (figures["epochs"] or float("inf"), -figures["accuracy"])


def mnist1d_cost(figures: Figures) -> tuple[float, float]:
    """Errors held out; among equals, the loss."""
    return (-figures["accuracy"], figures["loss"])


def study(
    out: Path,
    *,
    full: bool = False,
    seeds: int = 3,
    workers: int = 2,
    observer: Observer | None = None,
    chosen: Iterable[Problem] | None = None,
) -> Findings:
    """Tune every optimizer on every problem, then compare them on seeds that tuning didn't see.

    Args:
        out: folder of the runs' cache; a study that was broken off goes on there.
        full: the published sizes.
        seeds: reported seeds, from 0.
        workers: processes at a time.
        chosen: other problems than :func:`problems`.
    """
    cache = RunCache(out / "runs")

    def run_many(problem: Problem, runs: list[Settings]) -> list[Figures]:
        return run_all(problem.run, runs, cache, workers=workers, observer=observer)

    found = {
        problem.name: _compare(problem, _tune(problem, run_many), run_many)
        for problem in (problems(full, seeds) if chosen is None else chosen)
    }
    return summarise(found)


Runner = Callable[[Problem, list[Settings]], list[Figures]]


def _tune(problem: Problem, run_many: Runner) -> dict[str, Settings]:
    """The best learning rate and radius of every optimizer; AGA's ablations have AGA's."""
    best: dict[str, Settings] = {}
    tried: dict[str, dict[float, Any]] = {arm: {} for arm in problem.rates}
    open_rates = {arm: list(rates) for arm, rates in problem.rates.items()}
    for _ in range(1 + EXTENSIONS):
        trials = [
            _settings(problem, problem.tune, arm, lr, 0.0)
            for arm, rates in open_rates.items()
            for lr in rates
        ]
        for settings, figures in zip(trials, run_many(problem, trials), strict=True):
            tried[settings["arm"]][settings["lr"]] = problem.cost(figures)
        open_rates = {arm: _beyond(costs) for arm, costs in tried.items()}
    for arm, costs in tried.items():
        best[arm] = {"lr": min(costs, key=lambda lr: costs[lr]), "rho": 0.0}
    trials = [
        _settings(problem, problem.tune, arm, best[kin]["lr"] * share, rho)
        for arm, kin in KIN.items()
        for rho, share in RADII
    ]
    radii: dict[str, list[tuple[Any, Settings]]] = {arm: [] for arm in KIN}
    for settings, figures in zip(trials, run_many(problem, trials), strict=True):
        choice = {"lr": settings["lr"], "rho": settings["rho"]}
        radii[settings["arm"]].append((problem.cost(figures), choice))
    for arm, found in radii.items():
        best[arm] = min(found, key=lambda pair: pair[0])[1]
    return best | dict.fromkeys(ABLATIONS, best["adaptive"])


def _beyond(costs: dict[float, Any]) -> list[float]:
    """The next rate outside those tried, if the best lies at their edge."""
    rates = sorted(costs)
    best = min(rates, key=lambda lr: costs[lr])
    if best == rates[0]:
        return [float(f"{best / (rates[1] / rates[0]):.3g}")]
    if best == rates[-1]:
        return [float(f"{best * (rates[-1] / rates[-2]):.3g}")]
    return []


def _compare(problem: Problem, best: dict[str, Settings], run_many: Runner) -> dict[str, Any]:
    """Reported runs of every optimizer; its ablations have AGA's rate on the same seed."""
    wanted: dict[tuple[str, str, int], Settings] = {}
    for report, options in problem.reports.items():
        for arm in (arm for arm in ARMS if arm not in ABLATIONS):
            same = report == "equal_passes" and arm not in TWO_PASS
            options_of_arm = problem.reports["equal_steps"] if same else options
            for seed in range(problem.seeds):
                wanted[report, arm, seed] = _settings(
                    problem, options_of_arm, arm, best[arm]["lr"], best[arm]["rho"], seed
                )
    runs = dict(zip(wanted, run_many(problem, list(wanted.values())), strict=True))
    ablations = {
        (report, ablation, seed): _settings(
            problem,
            problem.reports[report],
            ablation,
            best[ablation]["lr"],
            best[ablation]["rho"],
            seed,
            round(figures["sync_rate"], 6),
        )
        for (report, arm, seed), figures in runs.items()
        for ablation in ABLATIONS
        if arm == "adaptive"
    }
    runs |= dict(zip(ablations, run_many(problem, list(ablations.values())), strict=True))
    return {
        "tuned": best,
        "reports": {
            report: {
                arm: [runs[report, arm, seed] for seed in range(problem.seeds)] for arm in ARMS
            }
            for report in problem.reports
        },
    }


def _settings(
    problem: Problem,
    options: Settings,
    arm: str,
    lr: float,
    rho: float,
    seed: int = TUNING_SEED,
    coin_rate: float = 0.0,
) -> Settings:
    own = {"arm": arm, "lr": lr, "rho": rho, "coin_rate": coin_rate, "seed": seed}
    return {"problem": problem.name} | problem.settings | options | own
