"""Many matrices updated together, as on CUDA, against one after the other."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from optimizer_rows import LORO, ROWS, SPAM, STABLE_SPAM
from small_matrices import assert_equal_states, relative
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.kernels import KernelCount
from lowrank_lab.device import cuda_path
from lowrank_lab.optim import Fira, GaLore, GoLore, LDAdam
from lowrank_lab.optim import stacks as stacking
from lowrank_lab.optim.muon import Muon
from lowrank_lab.optim.newton_schulz import orthogonalized

MATRICES = [(16, 16), (24, 10), (10, 24), (16, 16), (24, 10), (24, 16), (16, 10), (10, 24)]
EXTREMES = [(1, 7), (7, 1), (1, 1), (1, 7), (9, 1)]  # rank 1
FULL = [(8, 8), (12, 8), (8, 12), (8, 8)]  # rank 8
OTHERS = [(16,), (16,), (), (3, 4, 2), (31, 16), (5,)]
STEPS = 8
DECAY = {"weight_decay": 0.1}
PRECISE = {"state_precision": "fp32"}
STACKED = [row for row in ROWS if row.name != "combined"]


def normal(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shapes_of(row):
    """Groups of shapes, each with its rank; None: not ranked."""
    if row.kind == "whole":
        return [(MATRICES + EXTREMES + OTHERS, None)]
    if row.kind == "marked":
        return [(MATRICES + EXTREMES, 1), (OTHERS, None)]
    if row.kind == "factors":
        pairs = [((m, 3), (3, n)) for m, n in [(16, 16), (24, 10), (10, 24), (16, 16), (24, 5)]]
        return [(list(itertools.chain(*pairs)), 3), (OTHERS, None)]
    return [(MATRICES, 4), (EXTREMES, 1), (FULL, 8), (OTHERS, None)]


def optimizer_of(row, dtype, keys, **options):
    groups = []
    for number, (shapes, rank) in enumerate(shapes_of(row)):
        params = [nn.Parameter(normal(s, 7 * i + number, dtype)) for i, s in enumerate(shapes)]
        group = {"params": params, "lr": 0.01 * (1 + number)}
        own = row.keys | row.soon | keys if rank or row.kind == "whole" else {}
        if rank and "refresh" in row.cls.group_defaults:  # its default depends on the path
            own = {"refresh": "svd"} | own
        marked = {"rank": rank} if rank and row.kind != "marked" else {}
        groups.append(group | own | marked)
    return row.cls(groups, **options)


def give_gradients(optimizer, step):
    """A gradient for most parameters: some lack it now and then, so that states differ in age."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        lacks = i % 5 == 3 and step % 3 == 1
        G = normal(p.shape, 1000 * step + i, p.dtype) * (1 + step % 3)
        G.flatten()[:1].mul_(30 if step == 5 else 1)
        p.grad = None if lacks else G
    for group in optimizer.param_groups:
        group["lr"] *= 0.9


def trained(row, dtype, keys, stacked, **options):
    optimizer = optimizer_of(row, dtype, keys, **options)
    for step in range(STEPS):
        give_gradients(optimizer, step)
        with cuda_path() if stacked else nullcontext():
            optimizer.step()
    return optimizer


def assert_alike(ours, theirs, tolerance):
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(one["params"], other["params"], strict=True):
            assert_near(p.detach(), q.detach(), tolerance)
            a, b = ours.state[p], theirs.state[q]
            assert a.keys() == b.keys()
            if p.dtype == torch.bfloat16 and is_noise(ours, one, p):
                continue
            for name, value in b.items():
                if isinstance(value, torch.Tensor):
                    assert a[name].dtype == value.dtype, name
                    assert a[name].stride() == value.stride(), name
                    if name == "error":  # rounding noise at full rank; gradients are of size 1
                        difference = (a[name] - value).double().norm()
                        assert difference <= tolerance * (1 + value.double().norm())
                        continue
                    assert_near(a[name], value, tolerance)
                else:
                    assert a[name] == value, name


def is_noise(optimizer, group, p):
    """In the last of all directions LDAdam's iteration, which squares, leaves rounding noise."""
    return isinstance(optimizer, LDAdam) and group.get("rank") == min(p.shape, default=0) > 1


def assert_near(x, y, tolerance):
    assert x.shape == y.shape
    x, y = x.double(), y.double()
    if tolerance == 0 or not y.any():
        assert torch.equal(x, y)
    else:
        assert relative(x, y) <= tolerance


@pytest.mark.parametrize("row", STACKED, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_stacks_of_all_shapes_equal_one_by_one_in_float64(row, decay):
    runs = [trained(row, torch.float64, {}, s, weight_decay=decay) for s in (True, False)]
    assert_alike(*runs, 1e-9)


@pytest.mark.parametrize("row", STACKED, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_stacks_of_all_shapes_equal_one_by_one_up_to_rounding(row, dtype, tolerance):
    if "full" in row.name:
        pytest.skip("off the diagonal, Adam's directions are rounding noise at a refresh")
    runs = [trained(row, dtype, {}, s) for s in (True, False)]
    assert_alike(*runs, tolerance)


RANKED = [row for row in STACKED if row.kind == "ranked" and "full" not in row.name]


@pytest.mark.parametrize("row", RANKED, ids=str)
@pytest.mark.parametrize("options", [PRECISE, {"stochastic_rounding": True}, DECAY | PRECISE])
def test_averages_in_float32_and_random_rounding_are_those_of_one_by_one(row, options):
    runs = [trained(row, torch.bfloat16, {}, s, **options) for s in (True, False)]
    assert_alike(*runs, 0.05)
    states = [s for s in runs[0].state.values() if "exp_avg" in s]
    wide = torch.float32 if "state_precision" in options else torch.bfloat16
    assert {s["exp_avg"].dtype for s in states} == {wide}


@pytest.mark.parametrize("method", [GaLore, Fira])
def test_with_spread_refreshes_each_matrix_keeps_its_step(method):
    row = next(r for r in ROWS if r.cls is method)
    keys = {"update_proj_gap": 5, "spread_refresh": True}
    runs = [trained(row, torch.float64, keys, s) for s in (True, False)]
    assert_alike(*runs, 1e-9)
    offsets = {s["refresh_offset"] for s in runs[0].state.values() if "refresh_offset" in s}
    assert len(offsets) > 2


@pytest.mark.parametrize("row", [RANKED[0], SPAM, STABLE_SPAM, LORO], ids=str)
def test_small_batches_change_nothing(row, monkeypatch):
    whole = trained(row, torch.float64, {}, True)
    monkeypatch.setattr(stacking, "STACK_ENTRIES", 375)
    assert_alike(trained(row, torch.float64, {}, True), whole, 1e-9)


def test_a_matrix_that_fills_a_batch_alone_is_not_copied(monkeypatch):
    monkeypatch.setattr(stacking, "STACK_ENTRIES", 25)
    row = RANKED[0]
    runs = [trained(row, torch.float32, {}, s) for s in (True, False)]
    assert_alike(*runs, 1e-6)
    for p, q in zip(runs[0].state, runs[1].state, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_other_strides_of_weights_and_gradients_are_no_obstacle(shape):
    results = []
    for stacked in (True, False):
        params = [nn.Parameter(normal(shape[::-1], i, torch.float64).T) for i in range(3)]
        keys = {"rank": 4, "update_proj_gap": 2, "refresh": "svd"}
        optimizer = Fira([{"params": params, **keys}], lr=0.01)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = normal(shape[::-1], 10 * step + i, torch.float64).T
            with cuda_path() if stacked else nullcontext():
                optimizer.step()
        results.append([p.detach() for p in params])
    assert all(relative(p, q) <= 1e-9 for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("method", [GaLore, Fira, GoLore])
def test_a_refresh_that_fails_leaves_weights_and_the_numbers_of_all_states(method):
    params = [nn.Parameter(normal((12, 8), i, torch.float32)) for i in range(4)]
    keys = {"switch": 10**6} if method is GoLore else {}
    optimizer = method([{"params": params, "rank": 2, "update_proj_gap": 3, **keys}], lr=0.01)
    with cuda_path():
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = normal((12, 8), 10 * step + i, torch.float32)
            optimizer.step()
        before = [p.detach().clone() for p in params]
        numbers = [{k: v for k, v in optimizer.state[p].items() if k != "projection_right"
                    and not isinstance(v, torch.Tensor)} for p in params]  # fmt: skip
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
        params[2].grad[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="the gradient of parameter 2 is not finite"):
            optimizer.step()
        for p, W, n, v in zip(params, before, numbers, moments, strict=True):
            assert torch.equal(p, W)
            assert {k: optimizer.state[p][k] for k in n} == n
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], v)
        params[2].grad[0, 0] = 0.0
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert all(optimizer.state[p]["step"] == 4 for p in params)


def test_a_state_goes_from_one_form_to_the_other():
    row = next(r for r in ROWS if r.name == "fira")
    ends = []
    for stacked_first in (True, False):
        optimizer = trained(row, torch.float64, {}, stacked_first)
        fresh = optimizer_of(row, torch.float64, {})
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(fresh.state.values(), optimizer.state.values(), strict=True):
            assert_equal_states(p, q)
        for step in range(STEPS, STEPS + 4):
            give_gradients(fresh, step)
            with nullcontext() if stacked_first else cuda_path():
                fresh.step()
        ends.append(fresh)
    assert_alike(*ends, 1e-9)


# Muon


# Not bfloat16 without Nesterov: torch then divides its momentum itself by its norm.
@pytest.mark.parametrize(
    ("dtype", "nesterov", "tolerance"),
    [(torch.float32, True, 0.02), (torch.float32, False, 0.02), (torch.bfloat16, True, 0.1)],
)
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon_in_stacks_is_torchs_up_to_the_rounding_of_bfloat16(
    nesterov, adjust, dtype, tolerance
):
    results = []
    for cls in (Muon, torch.optim.Muon):
        params = [nn.Parameter(normal(s, i, dtype)) for i, s in enumerate(MATRICES + EXTREMES)]
        optimizer = cls(params, lr=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
        with cuda_path():
            for step in range(4):
                for i, p in enumerate(params):
                    lacks = step == 1 and i == 2
                    p.grad = None if lacks else normal(p.shape, 50 * step + i, dtype)
                optimizer.step()
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
        results.append(([p.detach() for p in params], momenta))
    for ours, theirs in zip(*results, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert relative(x.double(), y.double()) <= tolerance


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def iterated(U):
    """Newton and Schulz's iteration in float64."""
    a, b, c = COEFFICIENTS
    X = U.double() / U.double().norm()
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def test_orthogonalized_matrices_follow_their_iteration_in_float64():
    updates = [normal(s, i, torch.float64) for i, s in enumerate([(1, 7), (9, 5), (5, 9), (8, 8)])]
    found = orthogonalized(updates, [COEFFICIENTS] * 5, 1e-7, torch.float64)
    for U, ours in zip(updates, found, strict=True):
        assert relative(ours, iterated(U)) <= 1e-12


@pytest.mark.parametrize("shape", [(1, 7), (24, 16), (16, 24), (16, 16)])
def test_in_bfloat16_the_iteration_is_as_exact_as_torchs(shape):
    updates = [normal(shape, seed, torch.bfloat16) for seed in range(30)]
    found = orthogonalized(updates, [COEFFICIENTS] * 5, 1e-7)
    theirs = [_zeropower_via_newtonschulz(U, COEFFICIENTS, 5, 1e-7) for U in updates]
    exact = [iterated(U) for U in updates]
    ours, torchs = (
        sum(relative(x.double(), e) for x, e in zip(xs, exact, strict=True))
        for xs in (found, theirs)
    )
    assert ours <= 1.1 * torchs


def test_small_weights_with_averages_in_float32_are_updated_together_to_the_last_bit():
    def weights():
        chance = torch.Generator().manual_seed(0)
        shapes = [(48,), (48,), (5, 7), (), (48,)]
        return [nn.Parameter(torch.randn(s, generator=chance).bfloat16()) for s in shapes]

    ends = []
    for path in (cuda_path, nullcontext):
        ps, chance = weights(), torch.Generator().manual_seed(1)
        optimizer = GaLore(ps, lr=0.05, weight_decay=0.1, state_precision="fp32")
        for step in range(4):
            for i, p in enumerate(ps):
                p.grad = torch.randn(p.shape, generator=chance).bfloat16()
                if i == step:
                    p.grad = None  # its own number of steps from now on
            with path(), KernelCount() as count:
                optimizer.step()
        ends.append((ps, [optimizer.state[p] for p in ps], count.kernels["_fused_adamw_"]))
    (ps, states, joint), (others, other_states, single) = ends
    assert joint < single
    assert all(map(torch.equal, ps, others))
    for a, b in zip(states, other_states, strict=True):
        assert a["step"] == b["step"]
        assert a["exp_avg"].dtype == torch.float32
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
