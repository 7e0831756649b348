"""Kernels of an optimizer step on CUDA, counted without a card, and reads of the host."""

import pytest

from benchmarks.kernels import OPTIMIZERS, optimizer_kernels

LIMITS = {"60m": 40, "350m": 80}
# Newton and Schulz's iteration of two shapes takes 32 by itself, of three 48.
MORE = {"normuon": {"60m": 65, "350m": 105}, "spectron": {"60m": 70, "350m": 80}}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nothing_due_launches_few_kernels_and_reads_no_value(name, size):
    method, options = OPTIMIZERS[name]
    count = optimizer_kernels(method, size, options)
    assert 0 < count.total <= MORE.get(name, LIMITS)[size], count.kernels
    assert count.waits == 0
