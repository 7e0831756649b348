"""Kernels of an optimizer step on CUDA, counted without a card, and reads of the host."""

import pytest

from benchmarks.kernels import OPTIMIZERS, optimizer_kernels

LIMITS = {"60m": 40, "350m": 80}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nothing_due_launches_few_kernels_and_reads_no_value(name, size):
    method, options = OPTIMIZERS[name]
    count = optimizer_kernels(method, size, options)
    assert 0 < count.total <= LIMITS[size], count.kernels
    assert count.waits == 0


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_moments_in_8_bits_of_all_matrices_are_coded_together(method):
    pytest.importorskip("torchao")
    count = optimizer_kernels(method, "60m", {}, states="8bit")
    one_by_one = optimizer_kernels(method, "60m", {}, states="8bit", stacked=False)
    assert count.total < one_by_one.total / 8
    assert count.kernels["bucketize"] <= 12
    assert count.waits == 0
