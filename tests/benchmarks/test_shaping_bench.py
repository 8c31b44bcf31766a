"""The shaping bench at a tiny size."""

import pytest

from tiny_onn.benchmarks import peers
from tiny_onn.benchmarks.shaping import MEASURED, OPTIMIZERS, Step, bench_shaping

TINY = peers.Size(32, 2, 4, 4, 2, 32, batch=2, tokens=64)


def test_every_figure_is_there():
    result = bench_shaping(rounds=2, sizes={"T": TINY})["T"]
    assert result.keys() == OPTIMIZERS.keys()
    for figures in result.values():
        assert figures["experts"] == 2 * 2 * 4
        assert figures["sars_over_fars"] == pytest.approx(figures["sars_ms"] / figures["fars_ms"])
        for name in MEASURED:
            share = figures[f"{name}_ms"] / figures["step_ms"]
            assert figures[f"{name}_share"] == pytest.approx(share)
            assert 0 < share < 1
        # FARS keeps a few numbers an expert; SARS keeps what goes through the experts.
        assert figures["fars_extra_bytes"] <= 64 * figures["experts"]
        assert figures["sars_extra_bytes"] > 10 * figures["fars_extra_bytes"]


@pytest.mark.parametrize("strategy", ["none", *MEASURED])
def test_a_step_trains_and_times_its_part(strategy):
    step = Step(TINY, OPTIMIZERS["adamw"], strategy)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.run()
    assert len(step.shaping_s) == 1 and step.shaping_s[0] > 0
    changed = [name for name, p in step.model.named_parameters() if not p.equal(before[name])]
    assert len(changed) == len(before)
    assert step.peak_bytes() > 10_000
