"""The study of routers: its rules, its verdicts on figures that are known, and one tiny run."""

import json

import pytest
import torch

from tiny_onn.routing import ROUTERS
from tiny_onn.studies.routing import CLAIMED, COSTS, Size, study, verdicts
from tiny_onn.studies.routing_rules import (
    EXPERTS,
    FEATURES,
    RULES,
    build,
    parameters,
    run,
    sample,
)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_deterministic_and_roughly_balanced(rule):
    (x, label), (fresh, truth) = sample(rule, (10_000, 500), seed=3)
    (again, label_again), _ = sample(rule, (10_000, 500), seed=3)
    assert torch.equal(x, again) and torch.equal(label, label_again)
    assert label.shape == (10_000,) and truth.shape == (500,) and fresh.shape == (500, FEATURES)
    shares = label.bincount(minlength=EXPERTS) / len(label)
    assert len(shares) == EXPERTS and shares.min() > 0.1 and shares.max() < 0.45
    if rule in ("xor", "nested"):
        # A quarter each by symmetry; five standard deviations of a share of 10,000 tokens.
        assert (shares - 0.25).abs().max() < 0.022
    (other, _), _ = sample(rule, (10_000, 500), seed=4)
    assert not torch.equal(x, other)


def test_rules_with_known_answers():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4, FEATURES)
    x[:, :4] = torch.tensor([[1, 2, 3, 4], [1, 2, 3, -4], [1, -2, 3, 4], [-1, 2, -3, 4]])
    assert RULES["xor"](generator)(x).tolist() == [0, 1, 2, 3]
    x[:, :5] = torch.tensor([[1, -1, -1, 9, 9], [-1, 1, 1, 0, 0], [1, 1, 5, 1, 0], [1, 1, 5, 0, 2]])
    assert RULES["nested"](generator)(x).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("router", ROUTERS)
def test_matched_routers_have_about_as_many_parameters_as_the_mlp(router):
    goal = parameters(build("mlp", "as_is"))
    assert parameters(build(router, "matched")) == pytest.approx(goal, rel=0.05)


def test_a_run_is_deterministic_and_leaves_the_random_state_alone():
    settings = {"router": "affine", "variant": "as_is", "rule": "prototype", "lr": 0.1}
    settings |= {"train": 2048, "test": 2048, "epochs": 8, "seed": 0}
    before = torch.get_rng_state()
    figures = run(settings)
    assert torch.equal(before, torch.get_rng_state())
    assert figures["accuracy"] == run(settings)["accuracy"] > 0.9
    assert figures["accuracy"] > figures["majority"]
    assert figures["parameters"] == EXPERTS * (FEATURES + 1)


def test_a_router_does_not_start_as_the_rule():
    settings = {"router": "linear", "variant": "as_is", "rule": "linear", "lr": 0.0}
    settings |= {"train": 1, "test": 4096, "epochs": 1}
    assert all(run(settings | {"seed": seed})["accuracy"] < 0.75 for seed in range(4))


def made_up(accuracy, cost, entropy):
    """A table whose every rule has these figures, by router."""

    def figure(mean, std=0.0):
        return {"mean": mean, "std": std}

    return {
        router: {
            rule: {
                "accuracy": figure(accuracy[router]),
                "logit_entropy": figure(entropy[router], 0.1),
                **{key: figure(cost[router]) for key in (*COSTS, "training_cpu_s")},
            }
            for rule in RULES
        }
        for router in CLAIMED
    }


@pytest.mark.parametrize(
    ("accuracy", "cost", "entropy", "expected"),
    [
        # All that the claim says: alone on XOR (twice), cheap (two sizes), decided.
        ((0.3, 0.3, 0.4, 0.95), (1.0, 2.0, 2.0, 1.5), (1.0, 1.0, 1.0, 0.5), [True] * 7),
        # Linear solves XOR too; the MLP costs twice as much as linear and as CAPR.
        (
            (0.96, 0.3, 0.4, 0.99),
            (1.0, 1.0, 1.0, 2.0),
            (0.5, 1.0, 1.0, 1.0),
            [False] * 7,
        ),
        # Nobody solves XOR; the entropies are within a deviation of each other.
        (
            (0.3, 0.3, 0.4, 0.94),
            (1.0, 1.0, 1.0, 1.0),
            (1.0, 1.0, 0.5, 0.45),
            [False, False, True, True, False, False, None],
        ),
    ],
)
def test_verdicts_on_made_up_figures(accuracy, cost, entropy, expected):
    table = made_up(*(dict(zip(CLAIMED, row, strict=True)) for row in (accuracy, cost, entropy)))
    assert [verdict.holds for verdict in verdicts(table, table)] == expected


def test_the_study_from_end_to_end(tmp_path):
    size = Size(train=512, test=256, epochs=1)
    seen = []
    found = study(
        tmp_path, seeds=2, size=size, rates=(0.1,), observer=lambda *told: seen.append(told)
    )
    routers = set(ROUTERS)
    assert routers < set(found.result)
    assert {"matched", "chance", "majority", "seeds"} < set(found.result)
    for variant, costs in ((found.result, COSTS), (found.result["matched"], COSTS[:1])):
        for router in routers:
            assert list(variant[router]) == list(RULES)
            for cell in variant[router].values():
                for key in ("accuracy", "logit_entropy", "training_cpu_s", *costs):
                    assert set(cell[key]) == {"mean", "std"} and cell[key]["mean"] >= 0
    assert found.result["chance"] == 0.25 and found.result["seeds"] == [0, 1]
    assert len(found.verdicts) == 7 and set(RULES) < set(found.tables)
    found.write(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["mlp"]["xor"]["lr"] == 0.1
    assert (tmp_path / "plot.png").stat().st_size > 1000
    # Nothing is run again.
    assert study(tmp_path, seeds=2, size=size, rates=(0.1,)).result == found.result
