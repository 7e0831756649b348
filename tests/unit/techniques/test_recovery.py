"""The recovery of the learning rate as a scheduler: against the formula and the trainer."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lowrank_lab import RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.techniques import RecoveryLR
from lowrank_lab.training.schedule import learning_rate, scheduled_rate

TOTAL, K = 60, 7
RESETS = (11, 20, 24, 51)  # the third within the recovery of the second


def two_groups(lr=0.1, **more):
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.3 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, **more)


def sequential(o):
    parts = [
        schedulers.LinearLR(o, 0.1, total_iters=9),
        schedulers.CosineAnnealingLR(o, 40),
        schedulers.ExponentialLR(o, 0.9),
    ]
    return schedulers.SequentialLR(o, parts, milestones=[9, 40])


def hugging_face(o):
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(o, 6, TOTAL)


SCHEDULES = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda s: 1 / (1 + s)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda s: 0.97),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=TOTAL, eta_min=1e-3),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=13),
    "step": lambda o: schedulers.StepLR(o, 10),
    "several steps": lambda o: schedulers.MultiStepLR(o, [5, 27]),
    "linear": lambda o: schedulers.LinearLR(o, 0.3, total_iters=45),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=TOTAL, power=2),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.93),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=8),
    "one cycle": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=TOTAL),
    "sequential": sequential,
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 5), schedulers.ExponentialLR(o, 0.9)]
    ),
    "transformers": hugging_face,
}


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def plain(make, steps):
    """The learning rates of a schedule without resets, at each step."""
    optimizer = two_groups()
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(rates(optimizer))
        optimizer.step()
        if len(found) < steps:
            scheduler.step()
    return found


def expected(schedule, resets, step):
    last = max((r for r in resets if r <= step), default=None)
    if last is None or step - last >= K:
        return schedule[step]
    target = schedule[min(last + K, len(schedule) - 1)]
    return [rate * (0.001 + 0.999 * (step - last) / (K - 1)) for rate in target]


def drive(optimizer, recovery, steps, resets=RESETS):
    found = []
    for step in steps:
        found.append(rates(optimizer))
        assert recovery.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        if step + 1 < TOTAL:
            recovery.step()
        if step + 1 in resets:
            recovery.reset()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_recovers_after_each_reset_and_is_unchanged_elsewhere(name):
    schedule = plain(SCHEDULES[name], TOTAL)
    optimizer = two_groups()
    recovery = RecoveryLR(SCHEDULES[name](optimizer), recovery_steps=K)
    found = drive(optimizer, recovery, range(TOTAL))
    assert found == [expected(schedule, RESETS, step) for step in range(TOTAL)]
    assert found != schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cut", [5, 11, 14, 22, 51, 53])
def test_a_saved_recovery_goes_on_exactly(name, cut):
    optimizer = two_groups()
    recovery = RecoveryLR(SCHEDULES[name](optimizer), recovery_steps=K)
    drive(optimizer, recovery, range(cut))
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), recovery.state_dict()], saved)
    other = two_groups()
    resumed = RecoveryLR(SCHEDULES[name](other), recovery_steps=K)
    saved.seek(0)
    of_optimizer, of_recovery = torch.load(saved, weights_only=False)
    other.load_state_dict(of_optimizer)
    resumed.load_state_dict(of_recovery)
    assert rates(other) == rates(optimizer)
    ours, theirs = (
        drive(o, r, range(cut, TOTAL)) for o, r in ((other, resumed), (optimizer, recovery))
    )
    assert ours == theirs


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("recovery_steps", [2, 5, 10])
def test_its_rates_are_those_of_the_trainer(text_corpus, schedule, recovery_steps):
    config = resolve(
        RunConfig(
            model="tiny", vocab_size="byte", corpus=text_corpus, steps=TOTAL, method="low-rank",
            rank=4, reset_every=13, recovery_steps=recovery_steps, schedule=schedule, lr=3e-3,
        )
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: scheduled_rate(step, config))
    recovery = RecoveryLR(scheduler, recovery_steps)
    for step in range(TOTAL):
        assert rates(optimizer) == [learning_rate(step, config)]
        optimizer.step()
        recovery.step()
        if (step + 1) % 13 == 0:
            recovery.reset()


def test_an_optimizer_alone_has_a_constant_rate():
    optimizer = two_groups(lr=0.5)
    recovery = RecoveryLR(optimizer, recovery_steps=3)
    found = drive(optimizer, recovery, range(8), resets=(2,))
    assert [rate for rate, _ in found] == [0.5, 0.5, 0.5 * 0.001, 0.5 * 0.5005, 0.5, 0.5, 0.5, 0.5]


def test_rates_that_are_tensors_are_changed_in_place():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    recovery = RecoveryLR(schedulers.ExponentialLR(optimizer, 0.5), recovery_steps=2)
    recovery.reset()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == pytest.approx(0.5**3 * 0.001)
    weight.grad = torch.ones(2)
    for expectation in (0.5**3, 0.5**3):
        optimizer.step()
        recovery.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate == pytest.approx(expectation)


def test_the_scheduler_within_does_not_notice_a_recovery():
    """A reset reads the future from a copy: neither momenta nor counts of OneCycleLR change."""
    optimizer = two_groups()
    recovery = RecoveryLR(SCHEDULES["one cycle"](optimizer), recovery_steps=K)
    drive(optimizer, recovery, range(9), resets=())
    before = copy.deepcopy((recovery.scheduler.state_dict(), recovery.scheduler.last_epoch))
    momentum = [group["momentum"] for group in optimizer.param_groups]
    recovery.reset()
    assert (recovery.scheduler.state_dict(), recovery.scheduler.last_epoch) == before
    assert [group["momentum"] for group in optimizer.param_groups] == momentum
    assert recovery.last_epoch == 9


@pytest.mark.parametrize("steps", [1, 0, -3, 2.5, "10", None])
def test_too_few_recovery_steps_are_refused(steps):
    with pytest.raises(ValueError, match=r"^recovery_steps: .+ is not allowed; at least 2$"):
        RecoveryLR(two_groups(), steps)


def test_schedules_that_follow_a_metric_are_refused():
    optimizer = two_groups()
    plateau = schedulers.ReduceLROnPlateau(optimizer)
    for scheduler in (plateau, "cosine"):
        with pytest.raises(
            ValueError, match=r"^scheduler: \w+ is not allowed; a scheduler that is"
        ):
            RecoveryLR(scheduler)
    with pytest.raises(ValueError, match=r"^epoch: 3 is not allowed"):
        RecoveryLR(optimizer).step(3)
