"""Changes that the device can turn off: each optimizer's, in every kind of step."""

import copy
import math
from functools import partial

import pytest
import torch
from optimizer_rows import ROWS
from optimizer_trial import Trial
from small_matrices import TALL
from torch._subclasses import FakeTensorMode

from lowrank_lab.device import cuda_path
from lowrank_lab.optim import found_inf, matrix_updates
from lowrank_lab.training.finite import StatesBefore, off_where

DECAY = {"weight_decay": 0.1}
PRECISE = {"state_precision": "fp32"} | DECAY
ROUNDED = {"stochastic_rounding": True} | DECAY
OWN = [row for row in ROWS if row.name != "combined"]  # its AdamW is not fused
CASES = [(row, options) for row in OWN for options in ({}, DECAY)] + [
    (row, options) for row in OWN if row.kind == "ranked"
    for options in (PRECISE, ROUNDED)
]  # fmt: skip


def try_to_spoil(trial):
    """A step on NaN that is off; nothing has changed after it."""
    kept = copy.deepcopy((trial.params, trial.optimizer.state_dict()["state"]))
    trial.give(torch.full(TALL, math.nan, dtype=trial.matrices[0].dtype))
    before = StatesBefore(trial.optimizer)
    with off_where(trial.optimizer, torch.ones(())):
        trial.optimizer.step()
    before.restore_()
    now = trial.params, trial.optimizer.state_dict()["state"]
    torch.testing.assert_close(now, kept, rtol=0, atol=0)


@pytest.mark.parametrize("fewest", [1, 99], ids=["stacked", "single"])
@pytest.mark.parametrize(("row", "options"), CASES, ids=str)
def test_steps_that_are_off_leave_no_trace(row, options, fewest, monkeypatch):
    """The first one, refreshes, exact steps, resets: the steps between them are bit for bit those
    of an optimizer that took no other."""
    monkeypatch.setattr(matrix_updates, "FEWEST", fewest)
    dtype = torch.bfloat16 if options in (PRECISE, ROUNDED) else torch.float32
    decay = {k: v for k, v in options.items() if k == "weight_decay"}
    precision = {k: v for k, v in options.items() if k not in decay}
    cls = partial(row.cls, **precision) if precision else row.cls
    both = [Trial(row, dtype=dtype, cls=cls, **row.soon | decay) for _ in range(2)]
    with cuda_path():
        for G in row.gradients(TALL, 6, dtype):
            try_to_spoil(both[0])
            for trial in both:
                with off_where(trial.optimizer, torch.zeros(())):
                    trial.advance([G])
    for p, q in zip(*(trial.params for trial in both), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda X, U: found_inf.add_(X, U, -0.3), lambda x, u: x - 0.3 * u),
        (lambda X, U: found_inf.lerp_(X, U, 0.05), lambda x, u: x + 0.05 * (u - x)),
        (lambda X, U: found_inf.decay_(X, 0.01), lambda x, u: 0.99 * x),
        (lambda X, U: found_inf.zero_(X), lambda x, u: 0 * x),
    ],
    ids=["add", "lerp", "decay", "zero"],
)
def test_changes_are_exact_to_one_rounding_or_off(change, expected, dtype):
    """Also of numbers, empty tensors and other strides, and of updates in another dtype."""
    shapes = ((3, 5), (), (0, 4), (7,))
    old = [torch.randn(s).to(dtype) for s in shapes] + [torch.randn(4, 6).to(dtype).T]
    U = [torch.randn(x.shape) for x in old]
    for flag in (None, 0.0, 1.0):
        X = [x.clone(memory_format=torch.preserve_format) for x in old]
        with cuda_path(), found_inf.off_where(None if flag is None else torch.tensor(flag)):
            change(X, U)
        for x, before, u in zip(X, old, U, strict=True):
            right = expected(before.double(), u.to(dtype).double()) if flag != 1 else before
            assert x.stride() == before.stride()
            tolerance = 4 * torch.finfo(dtype).eps if flag != 1 else 0
            torch.testing.assert_close(x, right.to(dtype), rtol=tolerance, atol=tolerance)


def test_without_values_the_change_has_shapes_only():
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode, cuda_path():
            X = [torch.empty(3, 4) for _ in range(2)]
            found_inf.add_(X, [torch.empty(3, 4) for _ in X], 0.5)
            found_inf.decay_(X, 0.5)
            assert X[0].shape == (3, 4)
