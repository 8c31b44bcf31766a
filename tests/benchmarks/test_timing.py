"""The bench's clock."""

import time

import pytest

from tiny_onn.benchmarks.timing import alternate


def test_candidates_take_turns_and_medians_are_theirs():
    calls = []

    def call(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    found = alternate({"a": call("a", 0.001), "b": call("b", 0.02)}, rounds=5, warmup=1)
    assert found["b"] == pytest.approx(0.02, rel=0.8) and found["a"] < found["b"]
    assert [sorted(calls[i : i + 2]) for i in range(0, 12, 2)] == [["a", "b"]] * 6
