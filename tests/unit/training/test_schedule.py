"""Learning rate and events are the formulas of methods.md, as pure functions of the step."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lab.config import RunConfig
from lowrank_lab.training.schedule import events, learning_rate, scheduled_rate

PEAK = 0.02


def config(steps=200, **values):
    return RunConfig(steps=steps, lr=PEAK, **values)


def ordinary(step, steps, warmup_steps):
    """Linear warm-up to the peak, cosine to 10 % of it."""
    if step < warmup_steps:
        return PEAK * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (steps - warmup_steps)
    return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def every_rate(run):
    return [learning_rate(step, run) for step in range(run.total_steps)]


@pytest.mark.parametrize("steps", [10, 20, 200, 1000])
def test_warmup_takes_ten_percent_and_a_cosine_falls_to_ten_percent(steps):
    expected = [ordinary(step, steps, steps // 10) for step in range(steps)]
    assert every_rate(config(steps)) == pytest.approx(expected, rel=1e-12)
    assert scheduled_rate(steps, config(steps)) == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.05, 0.07, 0.29])
def test_warmup_is_that_share_of_the_steps_to_the_step(share):
    for steps in range(100, 2000, 100):
        run = config(steps, warmup=share)
        last = round(share * steps) - 1  # the update that first has the peak
        rates = scheduled_rate(last - 1, run) if last else 0.0, scheduled_rate(last, run)
        assert rates == pytest.approx((PEAK * last / (last + 1), PEAK)), steps


def test_without_warmup_the_first_rate_is_the_peak():
    assert learning_rate(0, config(warmup=0.0)) == PEAK


def test_a_run_of_one_step_has_a_rate():
    assert 0 < learning_rate(0, config(1)) <= PEAK
    assert learning_rate(0, config(1, warmup=0.0)) == PEAK


def test_a_constant_schedule_stays_at_the_peak_after_warmup():
    assert set(every_rate(config(schedule="constant"))[20:]) == {PEAK}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_linear_schedule_falls_in_equal_steps_to_its_end(ratio):
    run = config(schedule="linear", min_lr_ratio=ratio)
    expected = [PEAK * (1 - (1 - ratio) * (s - 20) / 180) for s in range(20, 201)]
    assert [scheduled_rate(s, run) for s in range(20, 201)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("every", "recovery"), [(40, 10), (30, 2), (25, 25), (7, 3), (199, 10)])
def test_after_a_reset_the_rate_recovers_linearly(schedule, every, recovery):
    run = config(schedule=schedule, reset_every=every, recovery_steps=recovery)
    for reset in range(every, 200, every):
        target = scheduled_rate(reset + recovery, run)
        for k in range(min(recovery, 200 - reset)):
            expected = target * (0.001 + 0.999 * k / (recovery - 1))
            assert learning_rate(reset + k, run) == pytest.approx(expected, rel=1e-12)


def test_recovery_ends_at_what_the_schedule_has_ten_steps_after_the_reset():
    run = config(reset_every=50, recovery_steps=10)
    target = ordinary(60, 200, 20)
    assert learning_rate(50, run) == pytest.approx(0.001 * target)
    assert learning_rate(59, run) == pytest.approx(target)
    assert learning_rate(60, run) == pytest.approx(target)


@pytest.mark.parametrize(("every", "recovery"), [(40, 10), (7, 3), (25, 25)])
def test_before_the_first_reset_and_after_recovery_the_schedule_is_the_ordinary_one(
    every, recovery
):
    plain, run = config(), config(reset_every=every, recovery_steps=recovery)
    for step in range(200):
        if step < every or step % every >= recovery:
            assert learning_rate(step, run) == scheduled_rate(step, plain)


def test_without_recovery_steps_a_reset_leaves_the_rate_alone():
    assert every_rate(config(reset_every=40, recovery_steps=0)) == every_rate(config())


def test_refactorization_alone_leaves_the_rate_alone():
    assert every_rate(config(refactor_every=40)) == every_rate(config())


def test_a_reset_near_the_end_recovers_to_the_final_rate():
    run = config(100, reset_every=95, recovery_steps=10)
    assert learning_rate(95, run) == pytest.approx(0.001 * 0.1 * PEAK)
    assert learning_rate(99, run) == pytest.approx((0.001 + 0.999 * 4 / 9) * 0.1 * PEAK)


def test_events_come_at_multiples_of_their_periods_refactorization_first():
    run = config(31, refactor_every=4, reset_every=6, recovery_steps=2)
    found = {s: events(s, run) for s in range(1, 31) if events(s, run)}
    assert found == {
        4: ("refactor",),
        6: ("reset",),
        8: ("refactor",),
        12: ("refactor", "reset"),
        16: ("refactor",),
        18: ("reset",),
        20: ("refactor",),
        24: ("refactor", "reset"),
        28: ("refactor",),
        30: ("reset",),
    }


@pytest.mark.parametrize("values", [{"reset_every": 5}, {"refactor_every": 5}])
def test_nothing_happens_at_the_very_end(values):
    run = config(20, recovery_steps=2, **values)
    assert [s for s in range(1, 41) if events(s, run)] == [5, 10, 15]


def test_without_periods_there_are_no_events():
    assert not any(events(s, config()) for s in range(1, 201))


def test_events_on_every_step_are_possible():
    run = config(5, refactor_every=1, reset_every=1, recovery_steps=0)
    assert [events(s, run) for s in range(1, 6)] == [("refactor", "reset")] * 4 + [()]


RUNS = st.builds(
    config,
    steps=st.integers(41, 300),
    refactor_every=st.integers(0, 40),
    reset_every=st.sampled_from([0, 10, 17, 40]),
    recovery_steps=st.sampled_from([0, 2, 10]),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    min_lr_ratio=st.floats(0, 1),
)


@given(RUNS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_rate_and_events_depend_on_nothing_but_step_and_configuration(run, chance):
    before = copy.deepcopy(run)
    steps = list(range(run.total_steps))
    in_order = {s: (learning_rate(s, run), events(s + 1, run)) for s in steps}
    chance.shuffle(steps)
    assert {s: (learning_rate(s, before), events(s + 1, before)) for s in steps} == in_order
    assert run == before


@given(RUNS)
@settings(max_examples=40, deadline=None)
def test_the_rate_never_leaves_zero_to_the_peak(run):
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in every_rate(run))
    assert learning_rate(0, run) > 0
