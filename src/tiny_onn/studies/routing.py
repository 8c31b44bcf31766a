"""Is an MLP the router to have? Routers learn rules over Gaussian features as classifiers.

Every router is trained on every rule, as it is and at about the MLP router's number of parameters,
and scored on fresh tokens. For each of them the learning rate is searched on two seeds that are not
reported. What a forward pass costs is measured apart, with all routers taking turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiny_onn.routing import ROUTERS
from tiny_onn.studies.findings import Findings, Row, Verdict, spread, text_of
from tiny_onn.studies.routing_rules import (
    EXPERTS,
    FEATURES,
    RULES,
    Projected,
    build,
    one_thread,
    run,
)
from tiny_onn.studies.runs import Figures, Observer, RunCache, Settings, run_all

CLAIMED = ("linear", "cpr", "capr", "mlp")
"""The routers that the claim is about; all others are reported beside them."""

VARIANTS = ("as_is", "matched")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
TUNING_SEEDS = (100, 101)
WIDE = 128
"""A hidden size at which models run."""

SOLVED = 0.95
ABOUT_AS_MUCH = 1.5
CLEARLY_LESS = 0.8
COSTS = ("cpu_ms_per_1k_tokens", "cpu_ms_per_1k_tokens_hidden128")

Cell = dict[str, Any]
"""One router's figures on one rule."""

Table = dict[str, dict[str, Cell]]
"""Cells by router and rule."""


@dataclass(frozen=True)
class Size:
    """How much is learnt: tokens to train on and to be scored on, and passes over the former."""

    train: int = 8192
    test: int = 8192
    epochs: int = 30


FULL = Size(train=65_536, test=65_536, epochs=60)


def study(
    out: Path,
    *,
    full: bool = False,
    seeds: int = 5,
    workers: int = 1,
    observer: Observer | None = None,
    size: Size | None = None,
    rates: tuple[float, ...] = RATES,
) -> Findings:
    """Train and time all routers, and hold the claim against the figures.

    Args:
        out: folder that keeps finished runs.
        full: eight times the tokens and twice the epochs.
        seeds: how many seeds are reported: 0, 1, ...
        workers: processes that train; the clock runs in this one, after them.
        observer: told of every run.
        size: instead of what ``full`` says.
        rates: the learning rates that are tried.
    """
    cache = RunCache(out / "runs")
    sizes = asdict(size or (FULL if full else Size()))
    trials = {trial: _settings(*trial) | sizes for trial in product(VARIANTS, ROUTERS, RULES)}

    def train(runs: list[Settings]) -> list[Figures]:
        return run_all(run, runs, cache, workers=workers, observer=observer)

    tried = list(product(trials, rates))
    tuning = train([trials[t] | {"lr": lr, "seed": s} for t, lr in tried for s in TUNING_SEEDS])
    scores = {
        key: sum(figures["accuracy"] for figures in part)
        for key, part in zip(tried, _chunks(tuning, len(TUNING_SEEDS)), strict=True)
    }
    best = {trial: max(rates, key=lambda lr: scores[trial, lr]) for trial in trials}
    reported = train([trials[t] | {"lr": best[t], "seed": s} for t in trials for s in range(seeds)])
    figures = dict(zip(trials, _chunks(reported, seeds), strict=True))
    clocks = _clocks(cache, seeds, observer)

    def cell(variant: str, router: str, rule: str) -> Cell:
        trial = variant, router, rule
        return _cell(figures[trial]) | {"lr": best[trial]} | clocks[variant, router]

    tables: dict[str, Table] = {
        variant: {
            router: {rule: cell(variant, router, rule) for rule in RULES} for router in ROUTERS
        }
        for variant in VARIANTS
    }
    result = tables["as_is"] | {
        "matched": tables["matched"],
        "chance": 1 / EXPERTS,
        "majority": {
            rule: spread([f["majority"] for f in figures["as_is", "linear", rule]])
            for rule in RULES
        },
        "seeds": list(range(seeds)),
        "tuning_seeds": list(TUNING_SEEDS),
        "rates": list(rates),
        "size": sizes,
    }
    return Findings(
        result,
        _texts(tables),
        verdicts(tables["as_is"], tables["matched"]),
        lambda path: plot(tables, path),
    )


def _settings(variant: str, router: str, rule: str) -> Settings:
    """A router that has the MLP router's size is the same in both variants, and is run once."""
    same = not isinstance(build(router, variant), Projected)
    return {"variant": "as_is" if same else variant, "router": router, "rule": rule}


def _chunks(items: list[Figures], size: int) -> list[list[Figures]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _cell(runs: list[Figures]) -> Cell:
    spreads = ("accuracy", "logit_entropy", "training_cpu_s")
    cell: Cell = {key: spread([figures[key] for figures in runs]) for key in spreads}
    return cell | {"parameters": runs[0]["parameters"]}


def time_routers(settings: Settings) -> Figures:
    """Milliseconds of processor time that routers take for 1,000 tokens, one thread.

    All take turns in blocks of repeated calls, each round in a new order; a figure is the median
    over rounds. Routers are fresh: the time doesn't depend on what they learnt.

    Args:
        settings: ``routers``, names with a variant before the slash; ``hidden_size, rounds,
            repeats, seed``.
    """
    hidden_size = settings["hidden_size"]
    shuffle = random.Random(settings["seed"]).shuffle
    taken: dict[str, list[float]] = {name: [] for name in settings["routers"]}
    with one_thread(settings["seed"]), torch.inference_mode():
        modules = {}
        for name in taken:
            variant, router = name.split("/")
            narrow = hidden_size == FEATURES
            modules[name] = (
                build(router, variant) if narrow else ROUTERS[router](hidden_size, EXPERTS)
            )
        x_ND = torch.randn(1000, hidden_size)
        order = list(taken)
        for round_ in range(settings["rounds"] + 1):
            shuffle(order)
            for name in order:
                start = time.process_time()
                for _ in range(settings["repeats"]):
                    modules[name](x_ND)
                if round_ > 0:  # The first round warms up.
                    taken[name].append(time.process_time() - start)
    scale = 1000 / settings["repeats"]
    return {name: scale * statistics.median(times) for name, times in taken.items()}


def _clocks(
    cache: RunCache, seeds: int, observer: Observer | None
) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """What a forward pass costs, by variant and router; at the wide size only as it is."""
    names = [f"{variant}/{router}" for variant in VARIANTS for router in ROUTERS]
    settings = {"rounds": 60, "repeats": 20}
    runs = [
        settings | {"hidden_size": size, "routers": kept, "seed": seed}
        for size, kept in ((FEATURES, names), (WIDE, names[: len(ROUTERS)]))
        for seed in range(seeds)
    ]
    found = run_all(time_routers, runs, cache, observer=observer)
    clocks = {}
    for name in names:
        variant, router = name.split("/")
        figures = [
            spread([f[name] for f in part]) if name in part[0] else None
            for part in _chunks(found, seeds)
        ]
        clocks[variant, router] = {
            key: figure for key, figure in zip(COSTS, figures, strict=True) if figure
        }
    return clocks


def verdicts(as_is: Table, matched: Table) -> list[Verdict]:
    """Whether each sentence of the claim holds of the four routers that it is about."""
    return [
        _solves_alone(as_is, "as they are"),
        _solves_alone(matched, "at equal parameters"),
        *(_costs(as_is, "linear", key) for key in COSTS),
        *(_costs(as_is, "capr", key) for key in COSTS),
        _lowest_entropy(as_is),
    ]


def _solves_alone(table: Table, which: str) -> Verdict:
    accuracy = {router: table[router]["xor"]["accuracy"]["mean"] for router in CLAIMED}
    solvers = [router for router in CLAIMED if accuracy[router] >= SOLVED]
    return Verdict(
        f"the MLP is the only router of the four that solves XOR, {which} "
        f"(mean accuracy of at least {SOLVED})",
        solvers == ["mlp"],
        ", ".join(f"{router} {accuracy[router]:.3f}" for router in CLAIMED),
    )


def _costs(table: Table, other: str, key: str) -> Verdict:
    cost = {router: table[router]["xor"][key]["mean"] for router in ("mlp", other)}
    training = {router: table[router]["xor"]["training_cpu_s"]["mean"] for router in cost}
    ratio = cost["mlp"] / cost[other]
    claim, bound = {
        "linear": ("about as much as the linear router", ABOUT_AS_MUCH),
        "capr": ("clearly less than CAPR", CLEARLY_LESS),
    }[other]
    size = WIDE if key.endswith(f"hidden{WIDE}") else FEATURES
    return Verdict(
        f"the MLP costs {claim} (at most {bound} times) at hidden size {size}",
        ratio <= bound,
        f"{ratio:.2f} times: {cost['mlp']:.4f} against {cost[other]:.4f} ms per 1,000 tokens; "
        f"training on XOR {training['mlp'] / training[other]:.2f} times",
    )


def _lowest_entropy(table: Table) -> Verdict:
    """Undecided where no rule speaks against it, and on some the gap is within one deviation."""
    known, words = [], []
    for rule in RULES:
        entropy = {router: table[router][rule]["logit_entropy"] for router in CLAIMED}
        nearest = min(CLAIMED[:-1], key=lambda router: entropy[router]["mean"])
        gap = entropy[nearest]["mean"] - entropy["mlp"]["mean"]
        clear = abs(gap) > max(entropy[nearest]["std"], entropy["mlp"]["std"])
        known.append(gap > 0 if clear else None)
        words.append(
            f"{rule} {entropy['mlp']['mean']:.3f} against {nearest} {entropy[nearest]['mean']:.3f}"
        )
    holds = False if False in known else None if None in known else True
    claim = "the MLP has the lowest logit entropy of the four on every rule, as they are"
    return Verdict(claim, holds, ", ".join(words))


def _texts(tables: dict[str, Table]) -> dict[str, Sequence[Row]]:
    texts: dict[str, Sequence[Row]] = {}
    for rule in RULES:
        texts[rule] = [
            {
                "router": router,
                "variant": variant.replace("_", " "),
                "parameters": str(cell["parameters"]),
                "accuracy": text_of(cell["accuracy"], ".3f"),
                "logit entropy": text_of(cell["logit_entropy"], ".3f"),
                "training CPU s": text_of(cell["training_cpu_s"], ".2f"),
                "learning rate": f"{cell['lr']:g}",
            }
            for variant, table in tables.items()
            for router, cell in ((router, table[router][rule]) for router in ROUTERS)
        ]
    texts["CPU ms per 1,000 tokens"] = [
        {
            "router": router,
            f"as is, hidden size {FEATURES}": text_of(tables["as_is"][router]["xor"][COSTS[0]]),
            f"matched, hidden size {FEATURES}": text_of(tables["matched"][router]["xor"][COSTS[0]]),
            f"as is, hidden size {WIDE}": text_of(tables["as_is"][router]["xor"][COSTS[1]]),
        }
        for router in ROUTERS
    ]
    return texts


def plot(tables: dict[str, Table], path: Path) -> None:
    """Accuracy by rule and router with one standard deviation, one panel a variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    width = 0.8 / len(ROUTERS)
    panels = figure.subplots(2, 1, sharex=True)
    titles = {"as_is": "as they are", "matched": "at about equal parameters"}
    for axes, (variant, table) in zip(panels, tables.items(), strict=True):
        for i, router in enumerate(ROUTERS):
            accuracies = [table[router][rule]["accuracy"] for rule in RULES]
            axes.bar(
                [place + (i - (len(ROUTERS) - 1) / 2) * width for place in range(len(RULES))],
                [a["mean"] for a in accuracies],
                width,
                yerr=[a["std"] for a in accuracies],
                label=router,
            )
        axes.axhline(1 / EXPERTS, color="grey", linestyle="--", linewidth=1, label="chance")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("accuracy on fresh tokens")
        axes.set_title(titles[variant])
        axes.set_xticks(range(len(RULES)), list(RULES))
    figure.legend(
        *axes.get_legend_handles_labels(), ncols=len(ROUTERS) + 1, loc="outside lower center"
    )
    figure.savefig(path, dpi=120)
