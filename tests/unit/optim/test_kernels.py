"""Kernels of an optimizer step on CUDA, counted without a card, and reads of the host."""

import pytest

from benchmarks.kernels import OPTIMIZERS, step_kernels

LIMITS = {"60m": 40, "350m": 80}
# Newton and Schulz's iteration of two shapes takes 32 by itself, of three 48.
MORE = {"normuon": {"60m": 65, "350m": 105}, "spectron": {"60m": 75, "350m": 80}}
# Its subspace changes in every step: a power iteration, an orthonormal basis, and the moments in
# it, for each of three shapes of matrices (twice at 350m, whose stacks are halved).
OF_LDADAM = {"60m": 150, "350m": 210}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nothing_due_launches_few_kernels_and_reads_no_value(name, size):
    """The update and the check that can turn it off; of norm and clipping there are always few."""
    method, options = OPTIMIZERS[name]
    counts = step_kernels(method, size, options)
    limits = OF_LDADAM if method == "ldadam" else MORE.get(name, LIMITS)
    assert 0 < counts.check.total + counts.update.total <= limits[size], counts.update.kernels
    assert counts.norm.total < 10
    assert not any(count.waits for count in counts)


@pytest.mark.parametrize("name", ["galore", "fira", "stable-spam", "muon", "loro"])
def test_weight_decay_adds_a_kernel_for_each_group(name):
    method, options = OPTIMIZERS[name]
    plain, decayed = (
        step_kernels(method, "60m", options, weight_decay=decay).update.total for decay in (0, 0.1)
    )
    assert decayed <= plain + 2


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_moments_in_8_bits_of_all_matrices_are_coded_together(method):
    pytest.importorskip("torchao")
    together, one_by_one = (
        step_kernels(method, "60m", {}, stacked=stacked, state_precision="8bit").update
        for stacked in (True, False)
    )
    assert together.total < one_by_one.total / 6
    assert together.kernels["bucketize"] <= 12
    assert together.waits == 0
