"""The log of a run's routes: what it costs the run, where it goes on, and what it writes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_onn.arc import load_tasks
from tiny_onn.arc.batches import BatchConfig
from tiny_onn.arc.decode import DecodeConfig
from tiny_onn.arc.metrics import read_metrics
from tiny_onn.arc.recipe import ModelRecipe, Recipe, ShapingRecipe
from tiny_onn.arc.report import write_report
from tiny_onn.arc.route_view import read_routes
from tiny_onn.arc.routes import RouteLog, _packed, _unpacked
from tiny_onn.arc.schedule import ScheduleConfig
from tiny_onn.arc.solving import StoppedError, solve
from tiny_onn.arc.tasks import challenges_json
from tiny_onn.arc.tokens import encode_grid, encode_prompt
from tiny_onn.arc.training import TrainingRun
from tiny_onn.arc.vote import Candidate
from tiny_onn.shaping import RoutingMonitor

KEYS = {
    "routing_entropy",
    "load_entropy",
    "dead_experts",
    "top_share",
    "consistency",
    "mutual_information",
    "jitter",
}
TINY = Recipe(
    model=ModelRecipe(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=32,
        hidden_dropout=0.1,
    ),
    batches=BatchConfig(batch_tokens=256),
    schedule=ScheduleConfig(steps=6, warmup_steps=2),
    decode=DecodeConfig(views=8, hopeless=5.0),
)


@pytest.fixture(scope="module")
def tasks():
    return load_tasks("arcagi", ids=("b1948b0a", "44f52bb0", "0d3d703e"))


@pytest.fixture
def often(monkeypatch):
    """A look every other step, a probe every fourth."""
    monkeypatch.setattr(RoutingMonitor, "interval", 2)


def test_looking_changes_no_loss(tasks, often, monkeypatch):
    watched = [row["loss"] for row in TrainingRun(tasks, TINY).train()]
    monkeypatch.setattr(RouteLog, "look", lambda self, batch: {})
    monkeypatch.setattr("tiny_onn.arc.routes._probe_batch", lambda stream: None)
    assert [row["loss"] for row in TrainingRun(tasks, TINY).train()] == watched


def test_figures_are_logged_when_they_are_due(tasks, often):
    rows = list(TrainingRun(tasks, replace(TINY, schedule=ScheduleConfig(steps=7))).train())
    seen = [KEYS & row.keys() for row in rows]
    assert seen[1] == seen[3] == seen[5] == set()
    assert seen[0] == seen[2] == seen[6] == KEYS - {"jitter"}  # not yet, no probe, no probe
    assert seen[4] == KEYS
    assert 0 < rows[4]["jitter"] < 1 and 0 < rows[4]["consistency"] < 1


def test_each_site_is_counted_with_the_experts_it_chooses(tasks):
    """Three heads can't be shared out to two experts, so attention chooses one."""
    model = replace(TINY.model, num_attention_heads=3, head_dim=16, num_recurrences=2)
    run = TrainingRun(tasks, replace(TINY, model=model))
    next(iter(run.train()))
    logits, mask = run.trainer.last_routes
    assert len(logits) == 4
    for load_E, logits_NE, chosen in zip(run.routes.monitor.load, logits, [1, 2] * 2, strict=True):
        picked = logits_NE[mask.flatten()].topk(chosen).indices.flatten()
        torch.testing.assert_close(load_E, picked.bincount(minlength=4) / len(picked))
    top_share = max(float(load_E.max()) for load_E in run.routes.monitor.load)
    assert run.trainer.routing().top_share <= top_share


def test_the_probe_is_part_of_the_first_batch_and_takes_nothing_away(tasks):
    run, other = TrainingRun(tasks, TINY), TrainingRun(tasks, TINY)
    probe = run.routes._probe
    first = run.stream.next_batch()
    assert torch.equal(first.input_ids, other.stream.next_batch().input_ids)
    assert torch.equal(probe.input_ids, first.input_ids[:: len(first.input_ids)])
    assert probe.real_tokens == int((probe.segment_ids >= 0).sum())


@pytest.mark.parametrize("strategy", ["fars", "bias"])
def test_the_log_goes_on_where_it_stopped(tasks, tmp_path, often, strategy):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = replace(TINY, shaping=ShapingRecipe(strategy))
    solve(tasks, recipe, out=whole)
    steps: list[int] = []
    with pytest.raises(StoppedError):
        solve(
            tasks,
            recipe,
            out=broken,
            on_step=lambda run, metrics: steps.append(metrics["step"]),
            stop=lambda: len(steps) == 2,
        )
    solve(tasks, recipe, out=broken, resume=True)
    names = ("loss", *KEYS)
    first, second = (
        [{k: row[k] for k in names if k in row} for row in read_metrics(out / "metrics.jsonl")]
        for out in (whole, broken)
    )
    assert first == second and first[4].keys() > KEYS
    assert (whole / "routing.json").read_bytes() == (broken / "routing.json").read_bytes()
    # A run that was over when it went on has the same picture to write.
    (broken / "routing.json").unlink()
    solve(tasks, recipe, out=broken, resume=True)
    assert (whole / "routing.json").read_bytes() == (broken / "routing.json").read_bytes()


def test_a_selection_bias_counts(tasks, often):
    run = TrainingRun(tasks, replace(TINY, shaping=ShapingRecipe("bias")))
    for site in run.shaper.sites:
        site.block.selection_bias[2:] = 1e6
    next(iter(run.train()))
    assert run.routes.monitor.load[:, 2:].sum(-1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_a_packed_tensor_is_the_same_to_the_last_bit(dtype):
    tensor = (torch.randn(2, 3, 4) * 1e3).to(dtype)
    found = _unpacked(json.loads(json.dumps(_packed(tensor))))
    assert found.dtype == dtype and torch.equal(found, tensor)
    scalar = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(_unpacked(_packed(scalar)), scalar)
    assert _unpacked(_packed([1, 2])) == [1, 2]


def test_the_file_is_bounded_and_its_moments_are_spread(tasks, often, monkeypatch):
    monkeypatch.setattr("tiny_onn.arc.routes._MOST_MOMENTS", 4)
    run = TrainingRun(tasks, replace(TINY, schedule=ScheduleConfig(steps=22)))
    list(run.train())
    assert run.routes._steps == [1, 9, 17]
    assert len(run.routes._loads) == 3


def test_the_experts_of_each_cell(tasks, often, tmp_path):
    run = TrainingRun(tasks, TINY)
    next(iter(run.train()))
    small, wide = np.zeros((1, 1), np.uint8), np.array([[1, 2, 3, 4]] * 2, np.uint8)
    answers = {
        tasks[0].id: [[Candidate(small, 9, -1.0)]],
        tasks[1].id: [[Candidate(wide, 6, -1.0), Candidate(small, 2, -2.0)]],
        tasks[2].id: [[]],
    }
    run.routes.write(tmp_path / "routing.json", tasks, answers)
    picture = json.loads((tmp_path / "routing.json").read_text())
    assert [example["task"] for example in picture["examples"]] == [tasks[1].id, tasks[0].id]
    example = picture["examples"][0]
    assert example["answer"] == wide.tolist()
    # By another way: the model's own router on the whole sequence, read cell by cell.
    given = tasks[1].test[0].input
    ids = torch.tensor(np.concatenate((encode_prompt(given), encode_grid(wide))))[None]
    run.model.eval()
    with torch.no_grad(), run.trainer._autocast():
        zeros = torch.zeros_like(ids)
        outputs = run.model(
            input_ids=ids,
            segment_ids=zeros,
            task_ids=zeros + 1,
            symmetry_ids=zeros,
            output_router_logits=True,
            use_cache=False,
        )
    for route, logits in zip(example["routes"], outputs.router_logits, strict=True):
        best = logits.argmax(-1).tolist()
        kept = [e for e, token in zip(best, ids[0].tolist(), strict=True) if token < 10]
        cells = [e for key in ("input", "answer") for row in route[key] for e in row]
        assert cells == kept
    names = [route["site"] for route in example["routes"]]
    assert names == picture["sites"] == ["layers.0.self_attn.heads", "layers.0.mlp"]
    assert sum(picture["load"][0][0]) == pytest.approx(1000, abs=2)


def test_a_run_is_drawn(tasks, tmp_path, often):
    solution = solve(tasks, TINY, out=tmp_path)
    (tmp_path / "tasks.json").write_text(json.dumps(challenges_json(tasks)))
    attempts = {
        key: [dict.fromkeys(("attempt_1", "attempt_2"), [[0]]) for _ in tests]
        for key, tests in solution.attempts.items()
    }
    (tmp_path / "submission.json").write_text(json.dumps(attempts))
    view = read_routes(tmp_path / "routing.json")
    assert view is not None and len(view.maps) == 2
    html = write_report(tmp_path).read_text()
    assert "Load of the experts" in html and "Experts by task" in html
    for title in ("Distance of routes", "What a route tells of the task", "Routing entropy"):
        assert f">{title}</text>" in html


def test_looking_costs_little(tasks, tmp_path: Path, capsys):
    recipe = Recipe(schedule=ScheduleConfig(steps=100), batches=BatchConfig(batch_tokens=1024))
    run, spent = TrainingRun(tasks, recipe), 0.0
    look = run.routes.look

    def timed(batch):
        nonlocal spent
        start = time.perf_counter()
        found = look(batch)
        spent += time.perf_counter() - start
        return found

    run.routes.look = timed
    for _ in zip(range(20), run.train(), strict=False):
        pass
    share = spent / (run.seconds + spent)
    with capsys.disabled():
        print(f"\nlooking at the routes takes {share:.2%} of a run's time")
    # 0.5 % where nothing else ran; small batches like these make it look dear.
    assert share < 0.05
