"""The shaping study in small: what it looks at is what it says, its verdicts can fall."""

import json
import math

import pytest
import torch

from tiny_onn.studies import shaping as study
from tiny_onn.studies import signal, sub_rules
from tiny_onn.studies.shaping_findings import summarise

SMALL = {"steps": 30, "seconds": None, "record": False}


def settings(name, value=0.1, seed=0, **options):
    problem = study.problems(False, 3)[0]
    return study._settings(problem, SMALL | options, name, value, seed)


@pytest.mark.parametrize("name", study.ARMS)
def test_every_strategy_trains_on_the_sub_rules(name):
    figures = sub_rules.run(settings(name, study.ARMS[name].values[0], steps=60))
    assert figures["steps"] == 60 and figures["held_out_loss"] < 0.95
    assert 0 <= figures["mutual_information"] <= 2
    assert 0 < figures["jitter"] < 1
    assert figures == sub_rules.run(settings(name, study.ARMS[name].values[0], steps=60)) | {
        "seconds": figures["seconds"]
    }


def test_a_budget_of_time_ends_a_run():
    figures = sub_rules.run(settings("none", seconds=0.2, steps=10**6))
    assert figures["steps"] < 10**6 and 0.2 <= figures["seconds"] < 2


def test_the_rules_are_the_quadrants_of_two_features():
    x, y, rule = sub_rules.sample(500, torch.Generator().manual_seed(0))
    assert rule.bincount().min() > 80
    for g, matrix in enumerate(sub_rules.rules()):
        mine = rule == g
        torch.testing.assert_close(y[mine], x[mine] @ matrix.T)
        assert (x[mine, :2] > 0).unique(dim=0).shape[0] == 1


def test_the_recorder_sees_both_costs_and_shapes_nothing():
    plain, recorded = (sub_rules.run(settings("none", steps=40, record=r)) for r in (False, True))
    same = {key for key in plain if plain[key] == recorded[key]}
    assert plain.keys() - same == {"seconds"}
    for name in ("fars", "sars", "sars_routed"):
        assert -1 <= recorded[f"{name}_autocorrelation"] <= 1
        assert recorded[f"{name}_jitter"] > 0
        assert -1 <= recorded[f"{name}_load_correlation"] <= 1
    assert recorded["fars_jitter"] < recorded["sars_jitter"]


def test_autocorrelation_jitter_and_correlation():
    torch.manual_seed(0)
    walk, noise = torch.randn(4000, 2).cumsum(0), torch.randn(4000, 2)
    assert signal.autocorrelation(walk) > 0.99
    assert signal.autocorrelation(noise) == pytest.approx(0, abs=0.05)
    assert signal.autocorrelation(torch.stack([noise[:, 0], torch.ones(4000)], 1)) < 0.05
    assert signal.jitter(torch.tensor([[1.0], [3.0], [1.0]])) == pytest.approx(2 / (5 / 3))
    a = torch.randn(5, 3, 4)
    assert signal.correlation(a, 2 * a + 1) == pytest.approx(1)
    assert signal.correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(signal.mean_of([None])) and signal.mean_of([None, 1.0, 2.0]) == 1.5


def test_the_study_tunes_reports_and_judges(tmp_path):
    arms = {name: study.ARMS[name] for name in ("none", "balance", "fars")}
    problem = study.Problem(
        "sub_rules",
        sub_rules.run,
        SMALL,
        {"equal_steps": SMALL},
        SMALL | {"record": True},
        seeds=2,
        arms=arms,
    )
    seen = []
    findings = study.study(
        tmp_path, chosen=[problem], workers=1, observer=lambda *x: seen.append(x[2])
    )
    assert {s["seed"] for s in seen if len(seen)} == {study.TUNING_SEED, 0, 1}
    result = findings.result["sub_rules"]
    assert result["tuned"].keys() == arms.keys()
    assert result["equal_steps"]["fars"]["held_out_loss"]["std"] > 0
    assert "fars_jitter" in result["signal"]
    assert any("FARS learns better than balance" in v.claim for v in findings.verdicts)
    findings.write(tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 1000
    json.loads((tmp_path / "result.json").read_text())


def runs(**figures):
    return [{key: value + 0.01 * i for key, value in figures.items()} for i in range(3)]


@pytest.mark.parametrize("better", [True, False])
def test_a_verdict_can_go_either_way(better):
    sign = 1 if better else -1
    fars = runs(held_out_loss=1 - sign * 0.5, load_entropy=0.5, mutual_information=1 + sign * 0.5)
    other = runs(held_out_loss=1.0, load_entropy=0.5, mutual_information=1.0)
    kinds = {"autocorrelation": 0.5, "jitter": 0.5, "load_correlation": 0.5}
    costs = runs(
        **{f"{s}_{k}": v for s in ("fars", "sars", "sars_routed") for k, v in kinds.items()}
    )
    found = {
        "tuned": {"fars": 0.1, "balance": 0.1},
        "reports": {"equal_steps": {"fars": fars, "balance": other}},
        "signal": costs,
    }
    verdicts = {v.claim: v for v in summarise({"sub_rules": found}).verdicts}
    learns = verdicts["sub_rules, equal steps: FARS learns better than balance"]
    assert learns.holds is better
    assert learns.figure == f"held out loss {0.51 if better else 1.51} ± 0.01 against 1.01 ± 0.01"
    assert (
        verdicts[
            "sub_rules, equal steps: FARS's routes carry more about the task than balance"
        ].holds
        is better
    )
    assert verdicts["sub_rules, equal steps: FARS balances load better than balance"].holds is None
