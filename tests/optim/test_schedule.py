"""The learning rate in closed form, per step, and that a restored schedule goes on where it was."""

import math

import pytest

from blip2x.optim.schedule import WarmupCosine, learning_rate, planned_rates

SHAPE = {"lr": 1e-4, "warmup_start_lr": 1e-6, "warmup_steps": 20, "eta_min": 1e-5, "total_steps": 120}


def test_warm_up_is_a_line():
    for step in range(21):
        assert learning_rate(step, **SHAPE) == pytest.approx(1e-6 + 99e-6 * step / 20, rel=1e-12)


def test_cosine_is_a_cosine_at_every_step():
    for step in range(20, 121):
        expected = 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * (step - 20) / 100))
        assert learning_rate(step, **SHAPE) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(step, **SHAPE) for step in range(20, 121)]
    assert len(set(rates)) == 101  # no staircase
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-6), (20, 1e-4), (70, 5.5e-5), (120, 1e-5), (1000, 1e-5)])
def test_corner_points(step, rate):
    assert learning_rate(step, **SHAPE) == pytest.approx(rate, rel=1e-9)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, **{**SHAPE, "warmup_steps": 0}) == pytest.approx(1e-4)


def test_a_training_may_end_within_its_warm_up():
    assert learning_rate(4, **{**SHAPE, "total_steps": 5}) == pytest.approx(1e-6 + 99e-6 * 4 / 20)


@pytest.mark.parametrize("total", [1, 19, 20, 21])
def test_a_training_may_be_about_as_long_as_its_warm_up(total):
    for step in range(total):
        expected = 1e-6 + 99e-6 * step / 20  # of 21 steps the last one has the peak
        assert learning_rate(step, **{**SHAPE, "total_steps": total}) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 5), (50, 20), (250_000, 2000), (250_000, 0), (1000, 2000)])
def test_the_plan_has_both_ends_and_the_peak(total, warmup):
    shape = {**SHAPE, "warmup_steps": warmup, "total_steps": total}
    plan = planned_rates(100, **shape)
    assert (plan[0][0], plan[-1][0]) == (1, total) and len(plan) == min(total, len(plan)) <= 101
    assert all(rate == learning_rate(step - 1, **shape) for step, rate in plan)
    assert max(rate for _, rate in plan) == pytest.approx(max(learning_rate(step, **shape) for step in range(total)))


def test_paddle_schedule_follows_the_function():
    schedule = WarmupCosine(**SHAPE)
    for step in range(130):
        assert schedule() == learning_rate(step, **SHAPE)
        schedule.step()


def test_state_round_trip_does_not_restart_the_warm_up():
    schedule = WarmupCosine(**SHAPE)
    for _ in range(70):
        schedule.step()
    restored = WarmupCosine(**SHAPE)
    restored.set_state_dict(schedule.state_dict())
    for step in range(70, 75):
        assert restored() == learning_rate(step, **SHAPE)
        restored.step()
