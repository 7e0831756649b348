"""FRUGAL's `columns`: a projection of zeros and ones, stored as the numbers of what it chooses."""

import copy

import pytest
import torch
from equations import sides_of
from optimizer_rows import FRUGAL
from optimizer_trial import Trial
from small_matrices import ONE_SIDED, SQUARE, TALL, WIDE, readable

from lowrank_lab.analysis.spectra_recorder import momentum_direction
from lowrank_lab.optim.columns import as_matrix, index_of, index_overlap

forms = pytest.mark.parametrize("form", ["single", "stacked"], indirect=True)
shapes = pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=readable)


def with_matrices(state_dict, shape):
    """A state as earlier versions saved it: with the projection in the dtype of the weight."""
    saved = copy.deepcopy(state_dict)
    for entries in saved["state"].values():
        for name, side in zip(("projection_left", "projection_right"), shape, strict=True):
            if name in entries:
                entries[name] = as_matrix(entries[name], side)
    return saved


@forms
@shapes
@pytest.mark.parametrize("side", ONE_SIDED)
def test_a_state_with_the_projection_itself_loads_and_goes_on(shape, side, form):
    keys = {"proj": "columns", "proj_type": side}
    grads = FRUGAL.gradients(shape, 21)
    trial = Trial(FRUGAL, shape, **keys).advance(grads[:13])
    old = with_matrices(trial.optimizer.state_dict(), shape)
    entries = {k: v for state in old["state"].values() for k, v in state.items()}
    assert [v.ndim for k, v in entries.items() if k.startswith("projection")] == [2]
    other = Trial(FRUGAL, shape, **keys)
    other.copy_from(trial)
    other.optimizer.load_state_dict(old)
    assert {k: v for state in old["state"].values() for k, v in state.items()} == entries
    assert torch.equal(*(t.advance(grads[13:]).result() for t in (trial, other)))


@shapes
def test_the_state_has_r_numbers_also_in_bfloat16_and_after_loading(shape):
    trial = Trial(FRUGAL, shape, 3, torch.bfloat16, proj="columns")
    trial.advance(FRUGAL.gradients(shape, 3, torch.bfloat16))
    trial.optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    found = [v for k, v in trial.states[0].items() if k.startswith("projection")]
    assert [(v.dtype, v.shape) for v in found] == [(torch.int64, (3,))]
    assert len(set(found[0].tolist())) == 3


def test_an_index_and_its_matrix_say_the_same():
    new, old = torch.tensor([4, 0, 2]), torch.tensor([2, 3, 4])
    P, Q = as_matrix(new, 6), as_matrix(old, 6)
    assert torch.equal(index_of(P), new)
    assert torch.equal(index_overlap(new, old).float(), P.T @ Q)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
def test_spectra_see_the_momentum_of_the_chosen_columns_in_full(shape):
    trial = Trial(FRUGAL, shape, 3, proj="columns").advance(FRUGAL.gradients(shape, 4))
    layer = torch.nn.Linear(*shape[::-1], bias=False)
    layer.weight = trial.matrices[0]
    L, R = sides_of(trial.states[0], shape)
    expected = L @ trial.states[0]["exp_avg"].double() @ R.T
    torch.testing.assert_close(momentum_direction(layer, trial.optimizer).double(), expected)
