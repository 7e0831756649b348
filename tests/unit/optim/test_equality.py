"""Every optimizer follows its equations in float64, and its published package where that is right.

Of all cases one by one, and of some in stacks, as many matrices are updated on CUDA.
The packages and equations of each stand in tests/optimizer_rows.py.
"""

import pytest
import torch
from equality_errors import by_equations, error, name_of, run, well_defined
from optimizer_rows import ROWS
from optimizer_trial import Trial
from small_matrices import SQUARE, TALL, WIDE, relative, start

# Sizes at which the stacked form is tried, too
STACKED = {(TALL, 4), (WIDE, 1), (SQUARE, 16), (TALL, None), ((9,), None), ((), None)}


def cases(rows):
    for row in rows:
        for shape, rank in row.sizes:
            for keys in row.cases:
                name = name_of(row, shape, rank, keys)
                yield pytest.param(row, shape, rank, keys, "single", id=name)
                if row.kind != "factors" and (shape, rank) in STACKED:
                    yield pytest.param(row, shape, rank, keys, "stacked", id=f"{name}, stacked")


FOLLOWED = [case for case in cases(row for row in ROWS if row.equations)
            if well_defined(case.values[0], case.values[3])]  # fmt: skip
PUBLISHED = [case for case in cases(row for row in ROWS if row.package)
             if case.values[0].package_is_right(*case.values[1:4])]  # fmt: skip


@pytest.mark.parametrize(("row", "shape", "rank", "keys", "form"), FOLLOWED, indirect=["form"])
def test_the_update_follows_the_equations_in_float64(row, shape, rank, keys, form):
    trial, before, seen = run(row, shape, rank, **keys)
    exact = by_equations(row, shape, rank, before, seen, **keys)
    assert error(trial.result(), exact, before) <= row.tolerance


@pytest.mark.parametrize(("row", "shape", "rank", "keys", "form"), PUBLISHED, indirect=["form"])
def test_the_update_equals_the_published_package(row, shape, rank, keys, form):
    ours, before, _ = run(row, shape, rank, **keys)
    theirs, *_ = run(row, shape, rank, row.package, **keys)
    assert error(ours.result(), theirs.result(), before) <= 1e-5
    limit = 1e-6 if row.kind == "ranked" else 1e-5  # b is AdamW's, or the method's too
    assert relative(ours.b.detach(), theirs.b.detach()) <= limit


@pytest.mark.parametrize("row", [row for row in ROWS if row.equations], ids=str)
def test_weight_decay_changes_the_update(row):
    plain, before, _ = run(row, TALL, 4)
    decayed, *_ = run(row, TALL, 4, weight_decay=0.1)
    assert error(decayed.result(), plain.result(), before) > 1e-3


forms = pytest.mark.parametrize("form", ["single", "stacked"], indirect=True)
SIZES = {"ranked": (SQUARE, TALL, WIDE), "marked": (SQUARE, TALL, WIDE), "whole": (TALL, (9,))}
HALF = [pytest.param(row, shape, rank, keys, id=name_of(row, shape, rank, keys))
        for row in ROWS if row.package and row.equations for keys in row.half
        for shape, rank in row.sizes if shape in SIZES[row.kind]]  # fmt: skip


@forms
@pytest.mark.parametrize(("row", "shape", "rank", "keys"), HALF)
def test_bfloat16_strays_little_further_from_the_equations_than_the_package(
    row, shape, rank, keys, form
):
    ours, before, seen = run(row, shape, rank, dtype=torch.bfloat16, **keys)
    exact = by_equations(row, shape, rank, before, seen, dtype=torch.bfloat16, **keys)
    theirs, *_ = run(row, shape, rank, row.package, dtype=torch.bfloat16, **keys)
    limit = row.bf16 * error(theirs.result(), exact, before)
    assert error(ours.result(), exact, before) <= limit
    if row.kind == "ranked":
        assert relative(ours.b.detach(), theirs.b.detach()) <= 2**-7


RANKED = [row for row in ROWS if row.package and row.kind == "ranked"]


@forms
@pytest.mark.parametrize("row", RANKED, ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_a_schedule_and_parameters_that_join_late_equal_the_published_package(row, late, form):
    """Learning rates fall, bias correction ends at step 20, gradients are missing now and then."""
    shape = TALL if row.package_is_right(TALL, 4, {}) else WIDE
    results = []
    for package in (None, row.package):
        trial = Trial(row, shape, 4, cls=package)
        for i, G in enumerate(row.gradients(shape)):
            for group in trial.optimizer.param_groups:
                group.update(lr=0.01 * (1 - i / 35), correct_bias=i < 20)
            trial.give(G)
            if late:
                trial.matrices[0].grad = G.clone() if i >= 13 else None
                trial.b.grad = G.sum(1) if i % 5 else None
            trial.optimizer.step()
        results.append((trial.result(), trial.b.detach().double()))
    (W, b), (their_W, their_b) = results
    assert error(W, their_W, start(shape)[0].double()) <= 1e-5
    assert relative(b, their_b) <= 1e-6
