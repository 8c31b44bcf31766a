"""What the shaping study found: figures, tables, a plot and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_onn.studies.findings import Findings, Row, Verdict, better, spread, text_of
from tiny_onn.studies.runs import Figures

MEASURES = (
    "held_out_loss",
    "solved",
    "solved_at_1",
    "load_entropy",
    "dead_experts",
    "routing_entropy",
    "consistency",
    "mutual_information",
    "jitter",
    "steps",
    "seconds",
)
PLOTTED = ("held_out_loss", "load_entropy", "mutual_information", "jitter")

Runs = dict[str, list[Figures]]


def summarise(found: dict[str, dict[str, Any]]) -> Findings:
    """Findings from the runs of every problem: ``{problem: {"tuned", "reports", "signal"}}``."""
    result: dict[str, Any] = {}
    tables: dict[str, Sequence[Row]] = {}
    verdicts: list[Verdict] = []
    for name, problem in found.items():
        signal = _averages(problem["signal"], [key for key in problem["signal"][0] if "_" in key])
        signal = {k: v for k, v in signal.items() if k.startswith(("fars", "sars"))}
        result[name] = {"tuned": problem["tuned"], "signal": signal}
        tables[f"{name}, the costs without shaping"] = [
            {"signal": key, "figure": text_of(figure)} for key, figure in signal.items()
        ]
        verdicts += _of_signal(name, problem["signal"])
        for report, runs in problem["reports"].items():
            averages = {arm: _averages(figures, MEASURES) for arm, figures in runs.items()}
            where = f"{name}, {report.replace('_', ' ')}"
            result[name][report] = averages
            tables[where] = [_row(arm, problem["tuned"][arm], averages[arm]) for arm in averages]
            verdicts += _of_runs(where, runs)
    return Findings(result, tables, verdicts, lambda path: _plot(path, found))


def _averages(runs: list[Figures], measures: Sequence[str]) -> dict[str, Any]:
    return {
        measure: spread([float(run[measure]) for run in runs])
        for measure in measures
        if measure in runs[0]
    }


def _row(arm: str, tuned: float, averages: dict[str, Any]) -> Row:
    return {"strategy": arm, "searched": f"{tuned:g}"} | {
        measure: text_of(figure) for measure, figure in averages.items()
    }


def _compared(claim: str, measure: str, a: list[Figures], b: list[Figures]) -> Verdict:
    """Whether a measure is larger in the runs ``a``; smaller, if it begins with a minus."""
    key = measure.removeprefix("-")
    values = [[float(run[key]) for run in runs] for runs in (a, b)]
    holds, figure = better(*(reversed(values) if measure != key else values))
    if measure != key:
        figure = " against ".join(reversed(figure.split(" against ")))
    return Verdict(claim, holds, f"{key.replace('_', ' ')} {figure}")


def _of_signal(name: str, runs: list[Figures]) -> list[Verdict]:
    verdicts = []
    for other in ("sars", "sars_routed"):
        for measure in ("autocorrelation", "-jitter"):
            key = measure.removeprefix("-")
            ours, theirs = ([{key: run[f"{s}_{key}"]} for run in runs] for s in ("fars", other))
            claim = f"{name}: FARS's cost is smoother than SARS's ({other})"
            verdicts.append(_compared(claim, measure, ours, theirs))
    load = spread([run["fars_load_correlation"] for run in runs])
    claim = f"{name}: an expert with few tokens has a small cost"
    text = f"correlation of cost and load {text_of(load)}"
    return [*verdicts, Verdict(claim, load["mean"] > 2 * load["std"], text)]


def _of_runs(where: str, runs: Runs) -> list[Verdict]:
    others = [arm for arm in runs if arm != "fars"]
    claims = [
        ("FARS without an auxiliary loss balances load better", "none", "load_entropy"),
        ("FARS balances load better", "balance", "load_entropy"),
        ("FARS's routes carry more about the task", "balance", "mutual_information"),
        ("FARS's routes carry more about the task", "none", "mutual_information"),
        *(("FARS learns better", arm, "-held_out_loss") for arm in others),
    ]
    if "solved" in runs["fars"][0]:
        claims += [("FARS solves more tasks", arm, "solved") for arm in others]
    return [
        _compared(f"{where}: {claim} than {other}", measure, runs["fars"], runs[other])
        for claim, other, measure in claims
        if other in runs
    ]


def _plot(path: Path, found: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, report) for name, problem in found.items() for report in problem["reports"]]
    figure, axes = plt.subplots(
        len(rows), len(PLOTTED), figsize=(4 * len(PLOTTED), 3 * len(rows)), squeeze=False
    )
    for line, (name, report) in zip(axes, rows, strict=True):
        runs: Runs = found[name]["reports"][report]
        for axis, measure in zip(line, PLOTTED, strict=True):
            figures = [spread([run[measure] for run in runs[arm]]) for arm in runs]
            means, errors = ([f[key] for f in figures] for key in ("mean", "std"))
            axis.bar(range(len(runs)), means, yerr=errors, capsize=3)
            axis.set_xticks(range(len(runs)), list(runs), rotation=60, fontsize=7)
            axis.set_title(f"{name}, {report.replace('_', ' ')}: {measure}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
