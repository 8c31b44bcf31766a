"""Cached runs, and what a study writes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_onn.studies.findings import Findings, Verdict, finite, markdown, spread
from tiny_onn.studies.runs import RunCache, Stopwatch, run_all


def double(settings):
    return {"value": settings["x"] * 2, "pid": os.getpid()}


def refuse(settings):
    if settings["x"] == 2:
        raise RuntimeError("no")
    return {"value": settings["x"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_are_cached_and_come_in_order(tmp_path, workers):
    cache = RunCache(tmp_path)
    cache.keep({"x": 3}, {"value": "kept"})
    seen = []
    runs = [{"x": x} for x in (1, 3, 1, 2)]
    found = run_all(
        double, runs, cache, workers=workers, observer=lambda n, of, s, f: seen.append((n, of))
    )
    assert [f["value"] for f in found] == [2, "kept", 2, 4]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (found[0]["pid"] == os.getpid()) == (workers == 1)
    assert run_all(refuse, runs, cache) == found


def test_a_run_that_fails_keeps_the_others(tmp_path):
    cache = RunCache(tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        run_all(refuse, [{"x": 1}, {"x": 2}, {"x": 3}], cache)
    assert cache.load({"x": 1}) == {"value": 1}
    assert cache.load({"x": 2}) is None


def nap(settings):
    (Path(settings["folder"]) / f"{os.getpid()}.pid").touch()
    time.sleep(60)
    return {}


def test_an_interrupted_study_leaves_no_process_behind(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)
from pathlib import Path
from test_runs import nap
from tiny_onn.studies.runs import RunCache, run_all
if __name__ == "__main__":
    runs = [{{"folder": {str(tmp_path)!r}, "x": x}} for x in range(4)]
    run_all(nap, runs, RunCache(Path({str(tmp_path / "cache")!r})), workers=2)
"""
    (tmp_path / "main.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stderr=subprocess.PIPE)
    workers = []
    for _ in range(600):
        workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
        if len(workers) == 2:
            break
        time.sleep(0.1)
    parent.terminate()
    assert b"KeyboardInterrupt" in parent.communicate(timeout=20)[1]
    assert len(workers) == 2
    for _ in range(100):
        if not any(is_running(pid) for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError("a worker is still running")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_file_that_was_cut_short_is_run_again(tmp_path):
    cache = RunCache(tmp_path)
    cache.keep({"x": 1}, {"value": 0})
    next(tmp_path.iterdir()).write_text('{"settings": {"x"')
    assert run_all(double, [{"x": 1}], cache)[0]["value"] == 2


def test_findings_are_written(tmp_path):
    findings = Findings(
        {"a": 1},
        {"figures": [{"arm": "x", "loss": "0.5"}]},
        [Verdict("it works", False, "0.5"), Verdict("who knows", None, "-")],
        lambda path: path.write_bytes(b"png"),
    )
    findings.write(tmp_path / "study")
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    assert result["a"] == 1 and result["verdicts"][0]["holds"] is False
    text = (tmp_path / "study" / "tables.md").read_text()
    assert "| x | 0.5 |" in text and "does not hold: it works (0.5)" in text
    assert (tmp_path / "study" / "plot.png").exists()
    assert markdown([]) == ""


def test_figures_that_json_cannot_say_are_null():
    assert finite({"a": [1.0, math.nan], "b": math.inf, "c": "x"}) == {
        "a": [1.0, None],
        "b": None,
        "c": "x",
    }


def test_spread_leaves_out_what_is_not_finite():
    assert spread([1.0, 3.0, math.inf]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2))}
    assert spread([5.0])["std"] == 0.0
    assert math.isnan(spread([])["mean"])


def test_the_stopwatch_goes_on():
    watch = Stopwatch()
    sum(range(100_000))
    assert watch.seconds > 0
