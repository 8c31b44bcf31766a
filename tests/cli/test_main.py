"""The command line as a user meets it: help, results, and one line for every mistake."""

import json
import subprocess
import sys
import time

import pytest

from tiny_onn.cli import main as cli

TASK = {
    "train": [
        {"input": [[1, 0]], "output": [[0, 1]]},
        {"input": [[2, 0]], "output": [[0, 2]]},
    ],
    "test": [{"input": [[3, 0]], "output": [[0, 3]]}],
}


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "mirror.json"
    path.write_text(json.dumps(TASK), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_help_is_quick_and_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    code = "import sys; from tiny_onn.cli.main import run; run(['--help']); "
    code += "print('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "--json" in text or "COMMAND [ARGS]" in text


def test_solve_writes_everything_and_ends_in_one_json_line(task_file, recipe, tmp_path, capfd):
    out = tmp_path / "run"
    words = ("--steps", 3, "--seed", 5, "--out", out, "--json", "--threads", 1)
    assert run("solve", "--data", task_file, "--config", recipe, *words) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    keys = {"tasks", "solved", "solved_at_1", "solved_ids", "train_seconds", "decode_seconds"}
    keys |= {"tokens_per_second", "parameters", "steps", "seed", "commit", "hardware", "versions"}
    assert keys <= result.keys()
    assert (result["tasks"], result["steps"], result["seed"]) == (1, 3, 5)
    assert captured.out.count("\n") == 1, "with --json stdout is the JSON line alone"
    written = {path.name for path in out.iterdir()}
    assert {
        "submission.json",
        "report.html",
        "metrics.jsonl",
        "checkpoint",
        "config.toml",
    } <= written
    submission = json.loads((out / "submission.json").read_text())
    assert set(submission["mirror"][0]) == {"attempt_1", "attempt_2"}
    assert "steps = 3" in (out / "config.toml").read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    # And the resumed run: the recipe is the run's own, three more steps are done.
    assert run("solve", "--out", out, "--resume", "--steps", 6, "--json") == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]

    # A resumed run of other tasks is refused, and leaves the folder as it was.
    before = {name: (out / name).read_bytes() for name in ("config.toml", "tasks.json")}
    assert run("solve", "--out", out, "--resume", "--data", "arcagi", "--tasks", "b1948b0a") == 2
    assert "error: " in capfd.readouterr().err
    assert {name: (out / name).read_bytes() for name in before} == before


def test_hidden_answers_are_said_to_be_hidden(recipe, tmp_path, capfd):
    path = tmp_path / "hidden.json"
    path.write_text(json.dumps({**TASK, "test": [{"input": [[3, 0]]}]}), encoding="utf-8")
    words = ("--config", recipe, "--steps", 1, "--out", tmp_path / "run", "--json")
    assert run("solve", "--data", path, *words) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert (result["tasks"], result["hidden"]) == (0, 1)
    assert "the answers are hidden" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["solve", "--data", "BAD", "--out", "OUT"],
            "train[1].input: row 1 has 1 cells, expected 2",
        ),
        (["solve", "--data", "nowhere", "--out", "OUT"], "nowhere: no such file or folder"),
        (["solve", "--tasks", "b1948b0b", "--out", "OUT"], "b1948b0a"),
        (["solve", "--config", "TOML", "--out", "OUT"], "did you mean 'schedule.steps'?"),
        (["solve", "--resume", "--out", "OUT"], "there is no run to go on with"),
        (["solve", "--steps", "0", "--out", "OUT"], "steps must be at least 1. Got 0"),
        (["solve", "--steps", "many", "--out", "OUT"], "--steps"),
        (["solve", "--stepps", "3"], "--stepps"),
        (["report", "OUT"], "OUT"),
        (["data", "check", "BAD"], "row 1 has 1 cells, expected 2"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, message, tmp_path, capfd):
    bad = {
        "train": [TASK["train"][0], {"input": [[1, 2], [3]], "output": [[1]]}],
        "test": TASK["test"],
    }
    places = {"BAD": "bad.json", "TOML": "bad.toml", "OUT": "OUT"}
    (tmp_path / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
    (tmp_path / "bad.toml").write_text("[schedule]\nstep = 3\n", encoding="utf-8")
    assert run(*(tmp_path / places[w] if w in places else w for w in words)) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_skip_bad_goes_on_with_the_good_tasks(task_file, recipe, tmp_path, capfd):
    (tmp_path / "tasks").mkdir()
    task_file.rename(tmp_path / "tasks" / "good.json")
    (tmp_path / "tasks" / "bad.json").write_text("{", encoding="utf-8")
    words = ("--config", recipe, "--steps", 1, "--out", tmp_path / "run", "--json")
    assert run("solve", "--data", tmp_path / "tasks", *words) == 2
    assert run("solve", "--data", tmp_path / "tasks", *words, "--skip-bad") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["tasks"] == 1
    assert "skipped: " in captured.err


def test_an_error_of_ours_has_status_1_and_debug_shows_it(monkeypatch, capsys):
    def broken(*words: object, **options: object) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr("tiny_onn.arc.tasks.load_tasks", broken)
    monkeypatch.setattr("tiny_onn.cli.data.load_tasks", broken)
    assert run("data", "list") == 1
    assert "internal: ZeroDivisionError: one over none" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run("data", "list", "--debug")


def test_data_commands(task_file, capsys):
    assert run("data", "check", task_file, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # INPUT 1 0 / OUTPUT 0 1 / END: nine tokens a pair.
    assert (result["tasks"], result["pairs"], result["tokens"], result["problems"]) == (
        1,
        2,
        18,
        [],
    )
    assert run("data", "list", task_file) == 0
    assert "mirror" in capsys.readouterr().out
    assert run("data", "show", task_file, "--tasks", "mirror") == 0
    assert "demonstrations" in capsys.readouterr().out


def test_lists_of_ids_in_every_form():
    spread = cli.spread(["solve", "--tasks", "a", "b,c", "--json", "--tasks", "d"])
    expected = [x for name in "abc" for x in ("--tasks", name)]
    assert spread == ["solve", *expected, "--json", "--tasks", "d"]


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "tiny_onn.studies.optimizer", raising=False)
    monkeypatch.delitem(sys.modules, "tiny_onn.studies.optimizers", raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert run("study", "optimizer", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: pytorch_optimizer is missing: pip install 'tiny-onn[bench]' brings it\n"
    )
