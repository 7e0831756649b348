"""What a refresh does to Adam's moments: keep, reset, transport; and GoLore's own rule."""

import copy

import pytest
import torch
from equations import sides_of
from optimizer_rows import FIRA, GALORE, GOLORE
from optimizer_trial import Trial
from small_matrices import (
    GAP,
    ONE_SIDED,
    SQUARE,
    TALL,
    WIDE,
    assert_equal_states,
    readable,
    relative,
)
from torch import nn

from lowrank_lab import RunConfig, reset_momentum_
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim import projection
from lowrank_lab.optim.carried import carried, follow_refresh_
from lowrank_lab.training.extend import extends

forms = pytest.mark.parametrize("form", ["single", "stacked"], indirect=True)
shapes = pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
METHODS = [(GALORE, {}), (FIRA, {}), (GOLORE, {"switch": 10**9})]
SIDED = [(row, keys, side) for row, keys in METHODS for side in (*ONE_SIDED, "full")
         if side in row.cls.proj_types]  # fmt: skip
sided = pytest.mark.parametrize(("row", "keys", "side"), SIDED, ids=str)
FOLLOWING = ["keep", "reset", "transport"]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signed_permutation(r, seed=0):
    chance = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (r, 1), generator=chance, dtype=torch.float64) * 2 - 1
    return signs * torch.eye(r, dtype=torch.float64)[torch.randperm(r, generator=chance)]


def rotation(r, seed=0):
    return torch.linalg.qr(normal(r, r, seed=seed))[0]


def turned_by(monkeypatch, turn):
    """Let each refresh but the first turn the basis, and change nothing else."""

    def refresh(G, old, step, group):
        if all(P is None for P in old):  # in float64, where PᵀP is the identity
            new = first(G, old, step, group)
            return tuple(P if P is None else torch.linalg.qr(P.double())[0] for P in new)
        return tuple(P if P is None else P @ turn(P.shape[-1], step + i).to(P.dtype)
                     for i, P in enumerate(old))  # fmt: skip

    first = projection.new_projections
    monkeypatch.setattr(projection, "new_projections", refresh)


def moments_in_full(trial, second=False):
    """L m Rᵀ: the first moment as a matrix shaped like the weight."""
    state = trial.states[0]
    L, R = sides_of(state, trial.matrices[0].shape)
    return L @ state["exp_avg"].double() @ R.T


# A turn of the basis


TURNED = [pytest.param(*case, shape, 4, id=f"{case[0]} {case[2]} {readable(shape)}")
          for case in SIDED for shape in (TALL, WIDE)] + [
    pytest.param(*case, shape, rank, id=f"{case[0]} {readable(shape)} {rank}")
    for case in SIDED[::5] for shape in (SQUARE, TALL) for rank in (1, min(shape))
]  # fmt: skip


@forms
@pytest.mark.parametrize(("row", "keys", "side", "shape", "rank"), TURNED)
def test_a_refresh_that_permutes_and_flips_the_basis_changes_no_step(
    row, keys, side, shape, rank, form, monkeypatch
):
    grads = row.gradients(shape, 35, torch.float64)
    start = {"proj_type": side, "dtype": torch.float64, **keys}
    turned_by(monkeypatch, signed_permutation)
    without = Trial(row, shape, rank, update_proj_gap=1000, **start)
    exact = without.advance(grads).result()
    carried_along = Trial(row, shape, rank, on_refresh="transport", **start)
    before = carried_along.result()
    assert relative(carried_along.advance(grads).result() - before, exact - before) <= 1e-9
    kept = Trial(row, shape, rank, on_refresh="keep", **start).advance(grads).result()
    assert rank == 1 or relative(kept - before, exact - before) > 1e-2


@forms
@sided
@shapes
def test_any_turn_of_the_basis_leaves_the_first_moment_and_the_sum_of_the_second(
    row, keys, side, shape, form, monkeypatch
):
    turned_by(monkeypatch, rotation)
    trial = Trial(row, shape, 4, proj_type=side, dtype=torch.float64, **keys)
    trial.advance(row.gradients(shape, GAP, torch.float64))
    ends = {}
    zero = torch.zeros(shape, dtype=torch.float64)  # only decays the moments
    for gap, how in ((1000, "keep"), (GAP, "transport")):
        twin = copy.deepcopy(trial)
        for group in twin.optimizer.param_groups:
            if "rank" in group:
                group |= {"update_proj_gap": gap, "on_refresh": how}
        ends[how] = twin.advance([zero])
    assert relative(*(moments_in_full(ends[how]) for how in ("transport", "keep"))) <= 1e-12
    v, w = (ends[how].states[0]["exp_avg_sq"] for how in ("keep", "transport"))
    assert w.sum().item() == pytest.approx(v.sum().item(), rel=1e-6)
    assert relative(w, v) > 0.01


@forms
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_a_turn_changes_no_step_where_the_second_moments_that_it_mixes_are_equal(
    side, form, monkeypatch
):
    turned_by(monkeypatch, rotation)
    steps = []
    for gap in (1000, GAP):
        trial = Trial(GALORE, TALL, 4, dtype=torch.float64, proj_type=side,
                      on_refresh="transport", update_proj_gap=gap)  # fmt: skip
        trial.advance(GALORE.gradients(TALL, GAP, torch.float64))
        trial.states[0]["exp_avg_sq"].fill_(0.7)
        before = trial.result()
        trial.advance([torch.zeros(TALL, dtype=torch.float64)])
        steps.append(trial.result() - before)
    assert relative(*steps) <= 1e-9


# A new subspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_transport_keeps_what_lies_in_both_subspaces_and_averages_second_moments(rank, dtype):
    old, new = (torch.linalg.qr(normal(12, rank, seed=i))[0].to(dtype) for i in (1, 2))
    m, v = normal(rank, 9).to(dtype), normal(rank, 9, seed=3).square().to(dtype)
    state = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    follow_refresh_(state, (old, None), (new, None), "transport")
    assert relative(new @ state["exp_avg"], new @ new.T @ old @ m) <= 1e-6
    assert (state["exp_avg_sq"] >= v.amin(0) * 0.999999).all()
    assert (state["exp_avg_sq"] <= v.amax(0) * 1.000001).all()


def test_a_direction_outside_the_old_subspace_has_no_momentum_and_the_mean_second_moment():
    eye = torch.eye(6)
    old, new = eye[:, :2], eye[:, [1, 4]]
    state = {"exp_avg": torch.tensor([[1.0], [2.0]]), "exp_avg_sq": torch.tensor([[3.0], [5.0]])}
    follow_refresh_(state, (old, None), (new, None), "transport")
    assert state["exp_avg"].flatten().tolist() == [2, 0]
    assert state["exp_avg_sq"].flatten().tolist() == pytest.approx([5, 4])


def test_moments_of_zero_stay_zero_and_moments_in_half_precision_are_carried_in_float32():
    old, new = (torch.linalg.qr(normal(40, 16, seed=i))[0].bfloat16() for i in (1, 2))
    m = normal(16, 30).bfloat16()
    state = {"exp_avg": m.clone(), "exp_avg_sq": torch.zeros_like(m)}
    follow_refresh_(state, (old, None), (new, None), "transport")
    exact = (new.double().T @ old.double()) @ m.double()
    assert relative(state["exp_avg"].double(), exact) <= 2**-8
    assert not state["exp_avg_sq"].any()
    assert all(t.dtype == torch.bfloat16 for t in state.values())


def test_a_stack_of_moments_is_carried_as_each_of_them():
    X, Y, m = normal(3, 4, 4), normal(3, 5, 5, seed=1), normal(3, 4, 5, seed=2)
    for second in (False, True):
        each = [carried(m[i], X[i], Y[i], second=second) for i in range(3)]
        assert relative(carried(m, X, Y, second=second), torch.stack(each)) <= 1e-14


# Resets


@forms
@sided
@pytest.mark.parametrize(("shape", "dtype"), [(TALL, torch.float32), (WIDE, torch.bfloat16)])
def test_a_reset_is_a_full_momentum_reset_before_each_refresh(row, keys, side, shape, dtype, form):
    grads = row.gradients(shape, 35, dtype)
    given = {"proj_type": side, "dtype": dtype, **keys}
    ours = Trial(row, shape, 4, on_refresh="reset", **given)
    theirs = Trial(row, shape, 4, on_refresh="keep", **given)
    for i, G in enumerate(grads):
        if i and i % GAP == 0:
            reset_momentum_(theirs.optimizer, params=theirs.matrices)
        ours.advance([G])
        theirs.advance([G])
    assert torch.equal(ours.matrices[0], theirs.matrices[0])
    assert_equal_states(ours.states[0], theirs.states[0])


@forms
@pytest.mark.parametrize("row", [GALORE, FIRA], ids=str)
def test_with_spread_refreshes_each_matrix_restarts_with_its_own(row, form):
    params = [nn.Parameter(normal(12, 8, seed=i)) for i in range(4)]
    group = {"params": params, "rank": 3, "update_proj_gap": 5, "spread_refresh": True}
    optimizer = row.cls([group | {"on_refresh": "reset", "refresh": "svd"}], lr=0.01)
    restarted = {}
    for step in range(12):
        for i, p in enumerate(params):
            p.grad = normal(12, 8, seed=100 * step + i)
        optimizer.step()
        for i, p in enumerate(params):
            if step and optimizer.state[p]["exp_avg_weight"] == pytest.approx(0.1):
                restarted.setdefault(i, []).append(step)
                R = optimizer.state[p]["projection_right"]
                assert relative(optimizer.state[p]["exp_avg"], 0.1 * p.grad @ R) <= 1e-12
    offsets = [optimizer.state[p]["refresh_offset"] for p in params]
    assert restarted == {i: [t for t in range(1, 12) if (t + offsets[i]) % 5 == 0]
                         for i in range(4)}  # fmt: skip
    assert len(set(offsets)) == 4


@pytest.mark.parametrize("how", FOLLOWING)
@pytest.mark.parametrize(("row", "keys"), METHODS, ids=str)
def test_a_refresh_that_fails_changes_no_moment_and_no_weight_of_one(row, keys, how):
    trial = Trial(row, on_refresh=how, **keys).advance(row.gradients(TALL, GAP))
    before = copy.deepcopy(trial.states[0])
    with pytest.raises(RuntimeError, match="is not finite"):
        trial.advance([torch.full(TALL, torch.nan)])
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_weight", "exp_avg_sq_weight", "step"):
        now = trial.states[0][name]
        assert torch.equal(now, before[name]) if torch.is_tensor(now) else now == before[name]


# Saved states, and runs


@pytest.mark.parametrize(("row", "keys"), METHODS, ids=str)
def test_a_state_without_the_key_loads_and_goes_on_as_the_group_says(row, keys):
    trial = Trial(row, **keys).advance(row.gradients(TALL, 7))
    saved = copy.deepcopy(trial.optimizer.state_dict())
    for group in saved["param_groups"]:
        group.pop("on_refresh", None)
    fresh = Trial(row, on_refresh="transport", **keys)
    fresh.copy_from(trial)
    fresh.optimizer.load_state_dict(saved)
    assert fresh.optimizer.param_groups[1]["on_refresh"] == "transport"
    trial.optimizer.param_groups[1]["on_refresh"] = "transport"
    ends = [t.advance(row.gradients(TALL, 25)[7:]).result() for t in (trial, fresh)]
    assert torch.equal(*ends)


def test_a_saved_value_that_is_not_allowed_is_refused_in_one_line():
    trial = Trial(GALORE).advance(GALORE.gradients(TALL, 2))
    saved = copy.deepcopy(trial.optimizer.state_dict())
    saved["param_groups"][1]["on_refresh"] = "carry"
    with pytest.raises(ValueError, match=r"^state_dict: on_refresh: 'carry' is not allowed; one"):
        trial.optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("method", "default"), [("galore", "keep"), ("golore", "published")])
def test_at_its_default_it_changes_no_run_id_and_no_extension_of_an_earlier_run(method, default):
    given = {"method": method, "rank": 4, "model": "tiny", "corpus": "markov", "steps": 10}
    plain = resolve(RunConfig(**given))
    assert plain.method_options["on_refresh"] == default
    ids = {how: resolve(RunConfig(**given, method_options={"on_refresh": how})).run_id
           for how in (default, "reset", "transport")}  # fmt: skip
    assert ids[default] == plain.run_id
    assert len(set(ids.values())) == 3
    options = {k: v for k, v in plain.method_options.items() if k != "on_refresh"}
    earlier = plain.override(method_options=options)
    assert earlier.run_id == plain.run_id
    assert extends(plain.override(steps=20), earlier)
