"""The optimizer study in small: its problems learn, its search is fair, its verdicts can fall."""

import math

import pytest
import torch
from torch import nn

from tiny_onn.arc import load_tasks
from tiny_onn.studies import grokking, mnist1d
from tiny_onn.studies import optimizer as study
from tiny_onn.studies.findings import better
from tiny_onn.studies.optimizers import ARMS, TWO_PASS, StackedMuon, build, coin


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("arm", ARMS)
def test_every_optimizer_learns_and_counts_its_passes(arm):
    net, calls = model(), []
    optimizer = build(arm, net, lr=0.02, weight_decay=0.0, coin_rate=0.5, seed=1)
    x = torch.randn(64, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], dim=1)

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert (len(calls) > 60) == (arm in TWO_PASS)
    assert (len(calls) == 120) == (arm in ("sync", "sam_adamw"))


def test_muon_takes_every_expert_as_a_matrix_of_its_own():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 5))
    apart = [nn.Parameter(stack.detach()[e].clone()) for e in range(3)]
    group = {"params": [stack], "orthogonal": True, "lr": 0.1, "weight_decay": 0.1}
    ours = StackedMuon([group], (0.9, 0.95))
    theirs = torch.optim.Muon(apart, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(3, 4, 5)
        for e, p in enumerate(apart):
            p.grad = stack.grad[e].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]))


def test_the_coin_comes_up_as_often_as_it_should():
    throws = coin(0.3, seed=0)
    assert sum(throws(None) for _ in range(2000)) == pytest.approx(600, abs=60)


def test_addition_is_split_without_overlap():
    tokens, sums, held, held_sums = grokking.addition(7, 0.4, seed=0)
    pairs = {tuple(row) for row in tokens.tolist()} | {tuple(row) for row in held.tolist()}
    assert len(pairs) == 49 and len(tokens) == 19
    assert torch.equal((tokens[:, 0] + tokens[:, 1]) % 7, sums)
    assert torch.equal((held[:, 0] + held[:, 1]) % 7, held_sums)


def test_grokking_stops_at_its_goal(monkeypatch):
    settings = {"arm": "off", "lr": 0.01, "rho": 0.0, "coin_rate": 0.0, "seed": 0}
    sizes = {"prime": 7, "share": 0.8, "epochs": 6}
    unreached = grokking.run(settings | sizes)
    assert unreached["epochs"] is None and len(unreached["curve"]) == 3
    monkeypatch.setattr(grokking, "GOAL", 0.0)
    reached = grokking.run(settings | sizes)
    assert reached["epochs"] == 2 and reached["passes"] == 2 and reached["seconds"] > 0


@pytest.mark.parametrize("unit", ["steps", "passes"])
def test_mnist1d_budgets(unit):
    settings = {"model": "mlp", "arm": "sync", "lr": 0.01, "rho": 0.05, "coin_rate": 0.0}
    figures = mnist1d.run(settings | {"seed": 0, "part": "tune", "budget": 20, "unit": unit})
    assert figures[unit] == 20 and figures["passes"] == 2 * figures["steps"]
    assert 0 <= figures["accuracy"] <= 1


def test_tuning_data_is_not_reported():
    parts = mnist1d.examples()
    rows = {name: {tuple(x) for x in inputs.tolist()} for name, (inputs, _) in parts.items()}
    assert not rows["tune"] & rows["report"] and not rows["train"] & rows["report"]


def fake_run(settings):
    """Best at lr 0.3 and rho 0.1; the coin is as good as AGA."""
    gap = abs(math.log10(settings["lr"] / 0.3)) + abs(settings["rho"] - 0.1)
    bonus = {"adaptive": 0.2, "coin": 0.2, "delayed": 0.2, "sync": 0.1}.get(settings["arm"], 0.0)
    noise = 0.01 * (settings["seed"] % 3)
    figures = {"accuracy": bonus - gap + noise, "loss": gap, "steps": 1, "passes": 1}
    return figures | {"seconds": 1.0, "sync_rate": 0.25 if settings["arm"] == "adaptive" else 0.0}


def fake_problem():
    rates = {"adamw": (1.0, 2.0, 4.0), "muon": (0.1, 0.2, 0.3, 0.4), "off": (0.1, 0.3, 1.0)}
    return study.Problem("mnist1d_x", fake_run, {}, rates, lambda f: -f["accuracy"])


def test_the_search_goes_on_beyond_an_edge_and_the_coin_has_agas_settings(tmp_path):
    found = study.study(tmp_path, seeds=3, workers=1, chosen=[fake_problem()])
    tuned = found.result["mnist1d_x"]["tuned"]
    assert tuned["adamw"]["lr"] == 0.25  # 1, 0.5, 0.25, 0.125: the last is worse
    assert tuned["off"]["lr"] == 0.3 and tuned["adaptive"] == {"lr": 0.3, "rho": 0.1}
    assert tuned["coin"] == tuned["delayed"] == tuned["adaptive"]
    text = {verdict.claim.split(": ")[1]: verdict.holds for verdict in found.verdicts}
    assert text["AGA beats as many second passes at random times"] is None
    assert text["AGA beats orthogonalised Adam without second passes"] is True
    assert text["AGA's sync rate is that of a coin"] is False
    found.write(tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 1000
    again = study.study(tmp_path, seeds=3, workers=1, chosen=[fake_problem()])
    assert again.result == found.result


def test_better_needs_two_standard_errors():
    assert better([1.0, 1.1, 0.9], [0.5, 0.6, 0.4])[0] is True
    assert better([0.5, 0.6, 0.4], [1.0, 1.1, 0.9])[0] is False
    assert better([1.0, 0.0, 0.5], [0.9, 0.1, 0.4])[0] is None


def test_arc_sets_do_not_overlap():
    from tiny_onn.studies.arc_demo import task_sets

    for full in (False, True):
        sets = task_sets(full)
        ids = {name: {task.id for task in tasks} for name, tasks in sets.items()}
        assert not ids["tune"] & ids["report"]
        assert all(sets["tune"].splits[key] == "training" for key in ids["tune"])


def test_an_arc_run_ends_in_figures(monkeypatch):
    from tiny_onn.studies import arc_demo

    sets = {"tune": load_tasks("arcagi", ids=["b1948b0a"])}
    monkeypatch.setattr(arc_demo, "task_sets", lambda full: sets)
    settings = {"arm": "off", "lr": 0.02, "rho": 0.0, "coin_rate": 0.0, "seed": 0}
    figures = study.run_arc(settings | {"part": "tune", "minutes": 0.02, "full": False})
    assert figures["tasks"] == 1 and figures["held_out_loss"] > 0 and figures["steps"] > 0
