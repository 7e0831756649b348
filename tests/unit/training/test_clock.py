"""Seconds are those that the device needed, also where the host is ahead of it."""

import time

import pytest
import torch

from lowrank_lab.training import clock
from lowrank_lab.training.clock import StepClock


class Device:
    """A queue of work that takes time only when it is waited for."""

    def __init__(self):
        self.queued, self.reached, self.waits = 0.0, 0.0, 0

    def mark(self, device):
        return Mark(self, self.queued)


class Mark:
    """A fake of `torch.cuda.Event`: can't be read before the device has reached it."""

    def __init__(self, device, at):
        self.device, self.at = device, at

    def synchronize(self):
        self.device.reached = max(self.device.reached, self.at)
        self.device.waits += 1

    def elapsed_time(self, end):
        assert max(self.at, end.at) <= self.device.reached, "not reached yet"
        return (end.at - self.at) * 1e3


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def on_cuda(device):
    return StepClock(torch.device("cuda"), device.mark)


def take_step(watch, device, forward_and_backward=3.0, update=1.0):
    watch.start()
    device.queued += forward_and_backward
    watch.ready()
    device.queued += update
    watch.wait()
    return watch.stop()


def test_a_step_lasts_until_its_numbers_and_its_update_counts_with_the_next(on_cuda, device):
    assert take_step(on_cuda, device) == 3
    assert device.reached == 3  # nobody waited for the update
    assert take_step(on_cuda, device) == 4
    assert on_cuda.settle() == 1
    assert on_cuda.settle() == 0
    assert on_cuda.seconds == device.queued == 8


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_waits_for_the_device_once(on_cuda, device, waits):
    for step in range(1, 5):
        on_cuda.start()
        device.queued += 3
        on_cuda.ready()
        if waits:
            on_cuda.wait()
        on_cuda.stop()
        assert device.waits == step


def test_work_between_steps_is_not_counted(on_cuda, device):
    for _ in range(3):
        take_step(on_cuda, device)
        on_cuda.settle()
        device.queued += 100  # an evaluation
    assert on_cuda.seconds == 12


def test_without_waiting_for_its_numbers_a_step_is_waited_for(on_cuda, device):
    on_cuda.start()
    device.queued += 3
    on_cuda.ready()
    assert on_cuda.stop() == 3


def test_on_a_cpu_a_step_takes_the_time_of_the_host(monkeypatch):
    now = iter([1.0, 3.0, 4.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = StepClock(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        watch.ready()
        watch.wait()
        assert watch.stop() == 3
    assert watch.seconds == 6


def test_marks_on_cuda_are_events_with_times(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            made.append(("event", enable_timing))

        def record(self):
            made.append("recorded")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert isinstance(clock.mark(torch.device("cuda")), Event)
    assert made == [("event", True), "recorded"]
