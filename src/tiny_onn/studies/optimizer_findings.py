"""What the optimizer study found: figures, tables, a plot and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tiny_onn.studies.findings import Findings, Row, Verdict, better, spread, text_of
from tiny_onn.studies.optimizers import ARMS, LONGEST
from tiny_onn.studies.runs import Figures

MEASURES = {
    "grokking": ("epochs", "passes", "seconds", "accuracy", "sync_rate"),
    "mnist1d": ("accuracy", "loss", "steps", "passes", "seconds", "sync_rate"),
    "arc": ("solved", "solved_at_1", "held_out_loss", "steps", "seconds", "sync_rate"),
}
"""Figures of each problem that are averaged over seeds; names of problems may go on after these."""

HEADLINE = {"grokking": ("epochs", -1), "mnist1d": ("accuracy", 1), "arc": ("held_out_loss", -1)}
"""The figure that decides a problem, and whether more of it is better."""

LAMBDA = 1.0
"""AGA's threshold, as the study runs it."""

Runs = dict[str, list[Figures]]


def summarise(found: dict[str, dict[str, Any]]) -> Findings:
    """Findings from the runs of every problem: ``{problem: {"tuned", "reports"}}``."""
    result = {
        name: {
            "tuned": problem["tuned"],
            **{
                report: {arm: _averages(name, runs[arm]) for arm in ARMS}
                for report, runs in problem["reports"].items()
            },
        }
        for name, problem in found.items()
    }
    tables: dict[str, Sequence[Row]] = {
        f"{name}, {report.replace('_', ' ')}": [
            _row(arm, result[name]["tuned"][arm], result[name][report][arm]) for arm in ARMS
        ]
        for name, problem in found.items()
        for report in problem["reports"]
    }
    verdicts = [v for name, problem in found.items() for v in _verdicts(name, problem["reports"])]
    return Findings(result, tables, verdicts, lambda path: _plot(path, found))


def _kind(name: str) -> str:
    return next(kind for kind in MEASURES if name.startswith(kind))


def _averages(name: str, runs: list[Figures]) -> dict[str, Any]:
    measures: dict[str, Any] = {
        measure: spread([run[measure] for run in runs if run[measure] is not None])
        for measure in MEASURES[_kind(name)]
    }
    if "epochs" in measures:
        measures["reached"] = sum(run["epochs"] is not None for run in runs)
    return {"runs": len(runs)} | measures


def _row(arm: str, tuned: dict[str, float], averages: dict[str, Any]) -> Row:
    figures = {k: text_of(v) for k, v in averages.items() if isinstance(v, dict)}
    counts = {k: str(v) for k, v in averages.items() if not isinstance(v, dict)}
    return (
        {"optimizer": arm, "lr": f"{tuned['lr']:g}", "rho": f"{tuned['rho']:g}"} | counts | figures
    )


def _verdicts(name: str, reports: dict[str, Runs]) -> list[Verdict]:
    measure, sign = HEADLINE[_kind(name)]
    verdicts = []
    for report, runs in reports.items():
        where = f"{name}, {report.replace('_', ' ')}, {measure}"
        for claim, a, b in (
            ("AGA beats as many second passes at random times", "adaptive", "coin"),
            ("AGA beats as many second passes at even intervals", "adaptive", "delayed"),
            ("AGA beats orthogonalised Adam without second passes", "adaptive", "off"),
            ("a second pass in every step beats none", "sync", "off"),
            ("ARS2-Neo without second passes beats Muon", "off", "muon"),
            ("ARS2-Neo without second passes beats AdamW", "off", "adamw"),
        ):
            holds, figure = better(*(_values(runs[arm], measure, sign) for arm in (a, b)))
            figure = figure.replace("-", "") if sign < 0 else figure
            verdicts.append(Verdict(f"{where}: {claim}", holds, figure))
    p = NormalDist().cdf(-LAMBDA)
    expected = p / (1 - (1 - p) ** LONGEST)
    rates = [run["sync_rate"] for runs in reports.values() for run in runs["adaptive"]]
    found = spread(rates)
    near = abs(found["mean"] - expected) < 0.25 * expected
    text = f"rate {text_of(found)}, a coin of Phi(-{LAMBDA:g}) = {p:.3f} gives {expected:.3f}"
    return [*verdicts, Verdict(f"{name}: AGA's sync rate is that of a coin", near, text)]


def _values(runs: list[Figures], measure: str, sign: int) -> list[float]:
    """A measure of all runs, larger for better; a goal that was never reached counts as reached
    one look after the end."""
    return [sign * float(run[measure] if run[measure] is not None else _never(run)) for run in runs]


def _never(run: Figures) -> float:
    return 2.0 * (len(run["curve"]) + 1)


def _plot(path: Path, found: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, report) for name, problem in found.items() for report in problem["reports"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (name, report) in zip(axes[0], panels, strict=True):
        runs = found[name]["reports"][report]
        measure, _ = HEADLINE[_kind(name)]
        axis.set_title(f"{name}, {report.replace('_', ' ')}", fontsize=9)
        if "curve" in runs[ARMS[0]][0]:
            _draw_curves(axis, runs)
        else:
            figures = [spread([run[measure] for run in runs[arm]]) for arm in ARMS]
            means, errors = ([f[key] for f in figures] for key in ("mean", "std"))
            axis.bar(range(len(ARMS)), means, yerr=errors, capsize=3)
            axis.set_xticks(range(len(ARMS)), ARMS, rotation=60, fontsize=8)
            axis.set_ylabel(measure)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(axis: Any, runs: Runs) -> None:
    """Held-out accuracy over epochs, a line for each seed, a colour for each optimizer."""
    for number, arm in enumerate(ARMS):
        for i, run in enumerate(runs[arm]):
            epochs = [2 * (k + 1) for k in range(len(run["curve"]))]
            label = arm if i == 0 else None
            axis.plot(epochs, run["curve"], color=f"C{number}", linewidth=1, label=label)
    axis.set_xlabel("epoch")
    axis.set_ylabel("held-out accuracy")
    axis.legend(fontsize=7)
