"""``train`` and ``eval``: the two halves of ``solve``, and what they refuse."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tiny_onn.cli import main as cli


def mirror(*colours, answers=True):
    train = [{"input": [[c, 0]], "output": [[0, c]]} for c in colours]
    answer = {"output": [[0, 9]]} if answers else {}
    return {"train": train, "test": [{"input": [[9, 0]]} | answer]}


@pytest.fixture
def place(tmp_path, recipe):
    """A folder with tasks, the same without answers, and small.toml."""
    for name, answers in (("tasks", True), ("hidden", False)):
        (tmp_path / name).mkdir()
        for task, colours in (("one", (1, 2)), ("two", (3, 4)), ("three", (5, 6))):
            text = json.dumps(mirror(*colours, answers=answers))
            (tmp_path / name / f"{task}.json").write_text(text, encoding="utf-8")
    return tmp_path


def run(*words):
    return cli.run([str(word) for word in words])


def train(place, command="train", data="tasks", out="run", steps=4):
    words = ("--data", place / data, "--config", place / "small.toml", "--steps", steps)
    return run(command, *words, "--out", place / out, "--json", "--threads", 1)


def last(capfd):
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_train_and_eval_are_what_solve_is(place, capfd):
    assert train(place) == 0
    trained = last(capfd)
    assert {"loss", "steps", "tokens", "tokens_per_second", "seed", "commit"} <= trained.keys()
    assert (trained["steps"], trained["tasks"]) == (4, 3)
    assert run("eval", "--out", place / "run", "--json") == 0
    found = last(capfd)
    assert train(place, "solve", out="solved") == 0
    solved = last(capfd)
    same = ("tasks", "solved", "solved_at_1", "solved_ids", "steps", "tokens", "parameters")
    assert {key: found[key] for key in same} == {key: solved[key] for key in same}
    for name in ("submission.json", "votes.json", "tasks.json"):
        ours, theirs = place / "run/eval" / name, place / "solved" / name
        assert ours.read_text(encoding="utf-8") == theirs.read_text(encoding="utf-8"), name
    assert (place / "run/eval/report.html").is_file()
    assert not (place / "run/submission.json").exists()


def test_train_goes_on_where_it_stopped(place, capfd):
    assert train(place) == 0
    assert run("train", "--out", place / "run", "--resume", "--steps", 6, "--json") == 0
    result = last(capfd)
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert result["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 6)


def test_a_killed_run_goes_on_to_the_same_losses(place, capfd):
    assert train(place, out="whole", steps=60) == 0
    out = place / "killed"
    words = ["train", "--data", place / "tasks", "--config", place / "small.toml", "--steps", 60]
    words += ["--checkpoint-every", 4, "--threads", 1, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "tiny_onn", *map(str, words)], stdout=subprocess.DEVNULL
    )
    log, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert log.read_bytes().count(b"\n") < 60
    assert run("train", "--out", out, "--resume", "--threads", 1) == 0
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (log, place / "whole/metrics.jsonl")
    ]
    assert len(losses[0]) == 60 and losses[0] == losses[1]


def test_some_tasks_are_answered_as_among_all(place, capfd):
    assert train(place) == 0
    assert run("eval", "--out", place / "run", "--json") == 0
    everything = json.loads((place / "run/eval/submission.json").read_text())
    assert run("eval", "--out", place / "run", "--tasks", "two", "--json") == 0
    assert last(capfd)["tasks"] == 1
    some = json.loads((place / "run/eval/submission.json").read_text())
    assert some == {"two": everything["two"]}


def test_answers_may_come_later(place, capfd):
    assert train(place, data="hidden") == 0
    assert run("eval", "--out", place / "run", "--json") == 0
    result = last(capfd)
    assert (result["tasks"], result["hidden"]) == (0, 3)
    assert run("eval", "--out", place / "run", "--data", place / "tasks", "--json") == 0
    assert last(capfd)["tasks"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "tow"), "two"),
        (("--split", "evaluation"), "none of the 3 tasks is of split 'evaluation'"),
        (("--max-cells", "1"), "max_cells=1 leaves none of 3 tasks"),
        (("--data", "arcagi"), "arcagi: no task one"),
    ],
)
def test_eval_refuses_what_the_checkpoint_does_not_know(place, capfd, words, message):
    assert train(place, steps=1) == 0
    capfd.readouterr()
    assert run("eval", "--out", place / "run", *words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert message in lines[0] and all(line.startswith("error: ") for line in lines)


def test_eval_needs_a_checkpoint(place, capfd):
    assert run("eval", "--out", place / "nothing") == 2
    assert "there is no run to go on with" in capfd.readouterr().err
    assert train(place, steps=1) == 0
    shutil.rmtree(place / "run/checkpoint")
    assert run("eval", "--out", place / "run") == 2
    assert "there is no checkpoint" in capfd.readouterr().err
