"""The schedule: rates that depend on the step alone, and an end the clock may move."""

import pytest

from tiny_onn.arc.schedule import Schedule, ScheduleConfig


def run(config: ScheduleConfig, seconds_per_step: float, restart_at: int | None = None):
    schedule, factors, step = Schedule(config), [], 0
    while True:
        schedule.update(step, step * seconds_per_step)
        if schedule.finished(step):
            return schedule, factors
        factors.append(schedule.factor(step))
        step += 1
        if step == restart_at:
            state = schedule.state_dict()
            schedule = Schedule(config)
            schedule.load_state_dict(state)


def test_steps_alone():
    _, factors = run(ScheduleConfig(steps=100, warmup_steps=10, cooldown=0.2), 1e6)
    assert len(factors) == 100
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([(20 - k) / 20 for k in range(20)])


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.7])
def test_minutes_alone_end_about_on_time(seconds):
    _, factors = run(ScheduleConfig(minutes=2.0, cooldown=0.2), seconds)
    assert len(factors) * seconds == pytest.approx(120, rel=0.05)
    assert factors[-1] < 0.1


def test_what_runs_out_first_ends_the_run():
    both = {"steps": 100, "minutes": 1.0, "warmup_steps": 0}
    assert len(run(ScheduleConfig(**both), 0.1)[1]) == 100
    assert len(run(ScheduleConfig(**both), 6.0)[1]) == 10


def test_rates_agree_until_the_cool_down_whatever_the_speed():
    config = ScheduleConfig(minutes=1.0, warmup_steps=20)
    slow, fast = run(config, 1.0)[1], run(config, 0.2)[1]
    assert slow[:45] == fast[:45]
    assert slow[-1] < fast[len(slow) - 1] == 1.0


@pytest.mark.parametrize("restart_at", [5, 45, 55])
def test_a_restart_changes_nothing(restart_at):
    config = ScheduleConfig(minutes=1.0, warmup_steps=10)
    assert run(config, 1.0, restart_at)[1] == run(config, 1.0)[1]


def test_a_run_given_more_steps_goes_on_to_its_new_end():
    schedule, _ = run(ScheduleConfig(steps=10), 1.0)
    longer = Schedule(ScheduleConfig(steps=30, warmup_steps=0))
    longer.load_state_dict(schedule.state_dict())
    longer.update(10, 10.0)
    assert not longer.finished(10) and longer.factor(10) == 1.0


def test_without_a_length_it_is_eight_minutes():
    assert Schedule(ScheduleConfig()).minutes == 8.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1. Got 0"),
        ({"minutes": 0.0}, "minutes must be more than 0. Got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative. Got -1"),
        ({"cooldown": 1.0}, "cooldown must be in 0-1. Got 1.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)
