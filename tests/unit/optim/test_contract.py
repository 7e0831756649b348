"""What every optimizer of the package does, whatever its method: the rows of optimizer_rows.py."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from optimizer_rows import ROWS
from optimizer_trial import Trial, shapes_of
from small_matrices import TALL, WIDE, assert_equal_states, readable, relative
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab import optim

OWN = [row for row in ROWS if inspect.isclass(row.cls)]  # whose groups and defaults are its own

forms = pytest.mark.parametrize("form", ["single", "stacked"], indirect=True)
rows = pytest.mark.parametrize("row", ROWS, ids=str)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
shapes = pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)


def growing(row, shape, dtype=torch.float32):
    """Gradients that keep what limits growth at work."""
    return [1.3 ** (i % 20) * G for i, G in enumerate(row.gradients(shape, 35, dtype))]


def test_every_optimizer_of_the_package_has_a_row():
    classes = {getattr(optim, name) for name in optim.__all__} - {optim.param_groups}
    assert classes == {row.cls for row in OWN} | {optim.Combined}


@forms
@rows
def test_equal_runs_are_equal_bit_for_bit_and_leave_the_global_generator_alone(row, form):
    one = Trial(row).advance(growing(row, TALL))
    torch.manual_seed(17)
    before = torch.get_rng_state()
    two = Trial(row).advance(growing(row, TALL))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(one.params, two.params, strict=True))


@pytest.mark.parametrize("row", [row for row in ROWS if row.converges], ids=str)
@shapes
def test_low_rank_regression_converges(row, shape):
    keys = dict(row.converges)
    steps, lr, share, rank = (keys.pop(k, 3) for k in ("steps", "lr", "share", "rank"))
    chance, (m, n) = torch.Generator().manual_seed(3), shape
    solution = torch.randn(m, 3, generator=chance) @ torch.randn(3, n, generator=chance) / 3
    X = torch.randn(50, max(shape), generator=chance)
    trial, losses = Trial(row, shape, rank, **keys), []
    for step in range(steps):
        for group in trial.optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        error = (trial.result().float() - solution).requires_grad_()
        loss = (X @ (error if m > n else error.T)).square().mean()
        losses.append(loss.item())
        trial.advance(torch.autograd.grad(loss, error))
    assert losses[-1] < share * losses[0]


@forms
@rows
@precisions
@pytest.mark.parametrize("rank", [1, 10])
def test_zero_gradients_leave_finite_weights_and_states_of_final_shape(row, dtype, rank, form):
    trial = Trial(row, TALL, rank, dtype, **row.soon)
    start, zero = trial.result(), torch.zeros(TALL, dtype=dtype)
    trial.advance([zero])
    shapes = shapes_of(trial.states)
    assert relative(trial.result(), start) <= (0.02 if row.kind == "factors" else 0)
    trial.advance([*row.gradients(TALL, 9, dtype), zero, zero] * 3)
    assert all(p.isfinite().all() for p in trial.params)
    assert not torch.equal(trial.result(), start)
    assert shapes_of(trial.states) == shapes


@forms
@rows
def test_parameters_without_gradient_are_left_alone(row, form):
    trial = Trial(row, weight_decay=0.1)
    before = copy.deepcopy(trial.params)
    trial.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trial.params, before, strict=True))
    assert not any(trial.states)


@forms
@pytest.mark.parametrize("row", OWN, ids=str)
def test_an_empty_parameter_is_no_obstacle(row, form):
    empty, W = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 3))
    empty.grad, W.grad = torch.zeros(0, 3), torch.ones(2, 3)
    row.cls([empty, W], lr=0.1).step()
    assert (W < 1).all()


@rows
def test_the_closure_is_evaluated_with_gradients_and_its_loss_returned(row):
    trial = Trial(row)

    def closure():
        loss = sum(p.square().sum() for p in trial.params)
        for p, g in zip(trial.params, torch.autograd.grad(loss, trial.params), strict=True):
            p.grad = g
        return loss

    before = closure().item()
    assert trial.optimizer.step(closure).item() == pytest.approx(before)
    assert closure().item() < before


@forms
@rows
def test_steps_run_on_fake_tensors_and_leave_states_of_the_real_shapes(row, form):
    with FakeTensorMode():
        fake = Trial(row, weight_decay=0.1, **row.soon)
        fake.advance([torch.randn(TALL) for _ in range(5)])
        found = shapes_of(fake.states)
    assert found == shapes_of(Trial(row, **row.soon).advance(row.gradients(TALL, 5)).states)


@forms
@rows
@shapes
@precisions
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_states_hold_no_more_memory_than_their_elements(row, shape, dtype, rank, form):
    trial = Trial(row, shape, rank, dtype, **row.soon).advance(row.gradients(shape, 3, dtype))
    tensors = [v for state in trial.states for v in state.values() if isinstance(v, torch.Tensor)]
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in tensors}
    # single numbers of several parameters may share a storage
    assert sum(s.nbytes() for s in storages.values()) == sum(v.nbytes for v in tensors)
    assert all(v.ndim == 0 or v.untyped_storage().nbytes() == v.nbytes for v in tensors)


@rows
def test_names_of_parameters_are_accepted_and_change_nothing(row):
    plain, named = Trial(row, **row.soon), Trial(row, **row.soon)
    for group in named.optimizer.param_groups:
        group["param_names"] = [f"p{i}" for i in range(len(group["params"]))]
    groups = [
        {**g, "params": list(zip(g.pop("param_names"), g["params"], strict=True))}
        for g in named.optimizer.param_groups
    ]
    if row.cls in {r.cls for r in OWN}:
        named.optimizer = row.cls(groups)
        assert all("param_names" in group for group in named.optimizer.param_groups)
    grads = row.gradients(TALL, 5)
    assert torch.equal(plain.advance(grads).result(), named.advance(grads).result())


@forms
@rows
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_bit_for_bit(row, copied, form):
    trial = Trial(row, **row.soon).advance(row.gradients(TALL, 3))
    twin = copied(trial)
    for t in (trial, twin):
        t.advance(row.gradients(TALL, 7)[3:])
    assert all(torch.equal(p, q) for p, q in zip(trial.params, twin.params, strict=True))


def compiled_and_plain(row, backend):
    """The parameters after some steps inside and outside of a compiled function."""
    plain, inside = Trial(row, **row.soon), Trial(row, **row.soon)

    @torch.compile(backend=backend)
    def step(G):
        inside.give(2 * G)
        inside.optimizer.step()

    for G in row.gradients(TALL, 5):
        plain.advance([2 * G])
        step(G)
    return inside.params, plain.params


@rows
def test_a_compiled_function_may_take_a_step(row):
    torch.compiler.reset()
    inside, plain = compiled_and_plain(row, "eager")
    for p, q in zip(inside, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# Saving and continuing


STOPS = [pytest.param(row, stop, id=f"{row}-{stop}") for row in ROWS for stop in row.stops]


@pytest.mark.parametrize(("row", "stop"), STOPS)
@shapes
@precisions
def test_a_fresh_instance_continues_bit_for_bit(row, shape, dtype, stop):
    grads = growing(row, shape, dtype)
    trial = Trial(row, shape, dtype=dtype).advance(grads[:stop])
    file = io.BytesIO()
    torch.save(trial.optimizer.state_dict(), file)
    file.seek(0)
    fresh = Trial(row, shape, dtype=dtype, **row.soon, lr=1.0)  # the saved groups replace these
    fresh.copy_from(trial)
    fresh.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(trial.states, fresh.states, strict=True):
        assert_equal_states(one, other)
    trial.advance(grads[stop:])
    fresh.advance(grads[stop:])
    assert all(torch.equal(p, q) for p, q in zip(trial.params, fresh.params, strict=True))
    for one, other in zip(trial.states, fresh.states, strict=True):
        assert_equal_states(one, other)


@forms
@rows
@precisions
def test_the_same_instance_goes_back_bit_for_bit(row, dtype, form):
    grads = growing(row, TALL, dtype)
    trial, there = Trial(row, dtype=dtype).advance(grads[:7]), Trial(row, dtype=dtype)
    there.copy_from(trial)
    saved = copy.deepcopy(trial.optimizer.state_dict())
    trial.advance(grads[7:])
    end, states = copy.deepcopy(trial.params), copy.deepcopy(trial.states)
    trial.copy_from(there)
    trial.optimizer.load_state_dict(saved)
    trial.advance(grads[7:])
    assert all(torch.equal(p, q) for p, q in zip(trial.params, end, strict=True))
    for one, other in zip(trial.states, states, strict=True):
        assert_equal_states(one, other)
