"""What does shaping the routes do to learning? A task with known sub-rules, and the ARC demo.

Every strategy has the same search: four weights, on a seed and on data that aren't reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_onn.studies import sub_rules
from tiny_onn.studies.arc_demo import train_and_score
from tiny_onn.studies.findings import Findings
from tiny_onn.studies.runs import Figures, Observer, Run, RunCache, Settings, run_all
from tiny_onn.studies.shaping_findings import summarise

TUNING_SEED = 100


@dataclass(frozen=True)
class Arm:
    """One way of shaping: a strategy, its options, and the option that is searched."""

    strategy: str
    options: Settings = field(default_factory=dict)
    searched: str = "w_meta"
    values: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)


ARMS = {
    "none": Arm("none", values=(0.0,)),
    "balance": Arm("balance", values=(0.001, 0.01, 0.03, 0.1)),
    "bias": Arm("bias", searched="rate", values=(0.0003, 0.001, 0.003, 0.01)),
    "z": Arm("z", values=(0.0001, 0.001, 0.003, 0.01)),
    "sars": Arm("sars"),
    "fars": Arm("fars"),
    "fars_per_load": Arm("fars", {"per_load": True}),
    "fars_entropy_only": Arm("fars", {"cost_alpha": 0.0}),
    "fars_cost_only": Arm("fars", {"w_entropy": 0.0, "cost_alpha": 1.0}),
}
"""The strategies; FARS also with its cost over the load, and each of its two terms alone."""


@dataclass(frozen=True)
class Problem:
    """One thing to learn.

    Attributes:
        name: its key in the result.
        run: trains and scores.
        tune: settings of the tuning runs.
        reports: settings of each kind of reported run.
        signal: settings of the runs whose costs are recorded, without shaping.
        seeds: how many seeds are reported.
        arms: the strategies.
    """

    name: str
    run: Run
    tune: Settings
    reports: dict[str, Settings]
    signal: Settings
    seeds: int
    arms: dict[str, Arm] = field(default_factory=lambda: ARMS)


def problems(full: bool, seeds: int) -> list[Problem]:
    """What is learnt, in the default form or the long one."""
    steps = 4000 if full else 1000
    rules = {"steps": steps, "seconds": None, "record": False}
    minutes = 8.0 if full else 1.25
    arc = {"minutes": None, "steps": None, "record": False, "full": full, "part": "report"}
    return [
        Problem(
            "sub_rules",
            sub_rules.run,
            tune=rules,
            reports={
                "equal_steps": rules,
                "equal_time": rules | {"steps": 100 * steps, "seconds": 16.0 if full else 4.0},
            },
            signal=rules | {"record": True},
            seeds=max(5, seeds),
        ),
        Problem(
            "arc",
            run_arc,
            tune=arc | {"part": "tune", "minutes": 0.4 * minutes},
            reports={
                "equal_steps": arc | {"steps": 1000 if full else 150},
                "equal_time": arc | {"minutes": minutes},
            },
            signal=arc | {"steps": 80, "record": True},
            seeds=seeds,
        ),
    ]


def run_arc(settings: Settings) -> Figures:
    """One run of the ARC demo with a strategy of the study.

    Args:
        settings: ``strategy, options, w_meta, seed, steps, minutes, record, full, part``.

    Returns:
        What :func:`~tiny_onn.studies.arc_demo.train_and_score` does, the monitor's figures on fresh
        views of the same tasks, and the recorder's.
    """
    from tiny_onn.studies.arc_routes import Routes, Shaping

    shaping = Shaping(settings["strategy"], settings["w_meta"], options=settings["options"])
    routes = Routes(settings["record"])
    tuning = settings["part"] == "tune"
    run, figures = train_and_score(
        settings["part"],
        seed=settings["seed"],
        minutes=settings["minutes"],
        steps=settings["steps"],
        full=settings["full"],
        shaping=shaping,
        on_step=routes.look,
        answers=not (tuning or settings["record"]),
    )
    return figures | routes.figures(run)


def study(
    out: Path,
    *,
    full: bool = False,
    seeds: int = 3,
    workers: int = 2,
    observer: Observer | None = None,
    chosen: Iterable[Problem] | None = None,
) -> Findings:
    """Tune every strategy on every problem, then compare them on seeds that tuning didn't see.

    Args:
        out: folder of the runs' cache; a study that was broken off goes on there.
        full: the long form.
        seeds: reported seeds, from 0.
        workers: processes at a time.
        chosen: other problems than :func:`problems`.
    """
    cache = RunCache(out / "runs")
    found = {}
    for problem in problems(full, seeds) if chosen is None else chosen:

        def run_many(runs: list[Settings], run: Run = problem.run) -> list[Figures]:
            return run_all(run, runs, cache, workers=workers, observer=observer)

        found[problem.name] = _compare(problem, run_many)
    return summarise(found)


def _compare(problem: Problem, run_many: Callable[[list[Settings]], list[Figures]]) -> Any:
    trials = [(name, value) for name, arm in problem.arms.items() for value in arm.values]
    found = run_many([_settings(problem, problem.tune, *trial, TUNING_SEED) for trial in trials])
    best: dict[str, float] = {}
    for name, arm in problem.arms.items():
        losses = {
            v: f["held_out_loss"] for (n, v), f in zip(trials, found, strict=True) if n == name
        }
        best[name] = min(arm.values, key=lambda value: losses[value])
    wanted = {
        (report, name, seed): _settings(problem, options, name, best[name], seed)
        for report, options in problem.reports.items()
        for name in problem.arms
        for seed in range(problem.seeds)
    }
    runs = dict(zip(wanted, run_many(list(wanted.values())), strict=True))
    signal = run_many(
        [_settings(problem, problem.signal, "none", 0.0, seed) for seed in range(problem.seeds)]
    )
    return {
        "tuned": best,
        "reports": {
            report: {
                name: [runs[report, name, seed] for seed in range(problem.seeds)]
                for name in problem.arms
            }
            for report in problem.reports
        },
        "signal": signal,
    }


def _settings(problem: Problem, options: Settings, name: str, value: float, seed: int) -> Settings:
    arm = problem.arms[name]
    strategy = {"strategy": arm.strategy, "options": arm.options, "w_meta": 0.1}
    if arm.searched == "w_meta":
        strategy["w_meta"] = value
    else:
        strategy["options"] = arm.options | {arm.searched: value}
    return {"problem": problem.name, "seed": seed} | options | strategy
