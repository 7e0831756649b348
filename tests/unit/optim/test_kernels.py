"""Kernels of an optimizer step on CUDA, counted without a card, and reads of the host."""

import pytest

from benchmarks.kernels import OPTIMIZERS, optimizer_kernels

LIMITS = {"60m": 40, "350m": 80}
# Its subspace changes in every step: a power iteration, an orthonormal basis, and the moments in
# it, for each of three shapes of matrices (twice at 350m, whose stacks are halved).
OF_LDADAM = {"60m": 150, "350m": 210}


@pytest.mark.parametrize("size", LIMITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_nothing_due_launches_few_kernels_and_reads_no_value(name, size):
    method, options = OPTIMIZERS[name]
    count = optimizer_kernels(method, size, options)
    limits = OF_LDADAM if method == "ldadam" else LIMITS
    assert 0 < count.total <= limits[size], count.kernels
    assert count.waits == 0
