"""Averages in float32 beside bfloat16 weights, random rounding, spread refreshes, buffers."""

import itertools

import pytest
import torch

from lowrank_lab import InputError, RunConfig
from lowrank_lab.memory.breakdown import persistent
from lowrank_lab.memory.formulas import optimizer_state_bytes
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim import Apollo, Fira, GaLore, GoLore, Loro
from lowrank_lab.optim.adam import random_bits, stochastic_round
from lowrank_lab.optim.channels import channel_norms
from lowrank_lab.optim.subspaces import leading_subspaces, randomized_subspaces

PROJECTED = [GaLore, Fira, Apollo, GoLore]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(method, shape=(24, 16), dtype=torch.bfloat16, keys=(), **options):
    W = torch.nn.Parameter(normal(*shape).to(dtype))
    b = torch.nn.Parameter(normal(7, seed=1).to(dtype))
    groups = [{"params": [W], "rank": 4, "update_proj_gap": 5, **dict(keys)}, {"params": [b]}]
    return W, b, method(groups, lr=1e-2, **options)


def step(optimizer, W, b, seed):
    W.grad = normal(*W.shape, seed=seed).to(W.dtype)
    b.grad = normal(7, seed=seed).to(b.dtype)
    optimizer.step()


@pytest.mark.parametrize("method", PROJECTED)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_averages_in_float32_are_those_of_a_float32_run_on_the_same_gradients(method, shape):
    W, b, optimizer = make(method, shape, state_precision="fp32")
    exact_W, exact_b, exact = make(method, shape, torch.float32)
    for seed in range(4):
        step(optimizer, W, b, seed)
        exact_W.grad, exact_b.grad = W.grad.float(), b.grad.float()
        exact.step()
    for p, reference in ((W, exact_W), (b, exact_b)):
        state, theirs = optimizer.state[p], exact.state[reference]
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == torch.float32
            error = (state[name] - theirs[name]).norm() / theirs[name].norm()
            assert error <= (1e-2 if p is W else 1e-6)  # the projection itself is in bfloat16


@pytest.mark.parametrize("method", PROJECTED)
def test_random_rounding_keeps_updates_that_rounding_to_nearest_loses(method):
    def change(**options):
        W, b, optimizer = make(method, (64, 48), **options)
        with torch.no_grad():
            W.fill_(1.0)
            b.fill_(1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        G = normal(64, 1, seed=3) @ normal(1, 48, seed=4)
        for _ in range(4):
            W.grad, b.grad = G.bfloat16(), torch.ones(7).bfloat16()
            optimizer.step()
        return (W.float() - 1).abs().sum().item(), (b.float() - 1).abs().max().item()

    lost, _ = change()
    kept, moved = change(stochastic_rounding=True)
    assert lost == 0
    assert kept > 0
    assert moved % 2**-8 == 0


def rounded_at(W, seed):
    return stochastic_round(W, random_bits(W.shape, seed, W.device))


def test_random_rounding_has_the_right_expectation_and_repeats_itself():
    W = torch.full((200_000,), 1 + 0.3 * 2**-7)
    rounded = rounded_at(W, seed=1).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.005)
    assert torch.equal(rounded, rounded_at(W, seed=1).float())
    assert not torch.equal(rounded, rounded_at(W, seed=2).float())


def test_random_rounding_leaves_what_bfloat16_holds_and_what_is_not_finite():
    W = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), -float("inf"), float("nan")])
    rounded = rounded_at(W, seed=0).float()
    assert torch.equal(rounded.nan_to_num(7), W.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_decay_is_applied_once_with_random_rounding(dtype):
    W, b, optimizer = make(GaLore, dtype=dtype, weight_decay=0.5, stochastic_rounding=True)
    before = b.detach().float().clone()
    W.grad, b.grad = torch.zeros_like(W), torch.zeros_like(b)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    assert torch.allclose(b.float(), before * 0.75, rtol=2**-7)


def test_bad_precisions_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match="state_precision: 'bf8' is not allowed"):
        make(GaLore, state_precision="bf8")
    pair = [torch.nn.Parameter(normal(6, 2)), torch.nn.Parameter(normal(2, 5))]
    with pytest.raises(ValueError, match="LORO"):
        Loro([{"params": pair, "rank": 2, "state_precision": "fp32"}])
    tiny = {"model": "tiny", "corpus": "markov", "state_precision": "fp32"}
    with pytest.raises(InputError, match="precision"):
        resolve(RunConfig(method="galore", **tiny))
    with pytest.raises(InputError, match="full-rank"):
        resolve(RunConfig(method="full-rank", precision="bf16", **tiny))


def test_a_run_configures_its_optimizer():
    config = RunConfig(
        model="tiny", corpus="markov", method="fira", precision="bf16",
        state_precision="fp32", stochastic_rounding=True,
    )  # fmt: skip
    _, optimizer = build(resolve(config))
    for group in optimizer.param_groups:
        assert (group["state_precision"], group["stochastic_rounding"]) == ("fp32", True)


@pytest.mark.parametrize("method", ["galore", "fira", "apollo", "golore"])
def test_bytes_of_states_in_float32_equal_the_formula(method):
    config = resolve(
        RunConfig(
            model="tiny", corpus="markov", method=method, precision="bf16", state_precision="fp32"
        )
    )
    model, optimizer = build(config)
    tokens = torch.randint(0, 16, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    assert persistent(model, optimizer).optimizer_states == optimizer_state_bytes(config)


def refreshes(spread, gap=6, matrices=3):
    """The steps at which each matrix got another projection."""
    params = [torch.nn.Parameter(normal(12, 8, seed=i)) for i in range(matrices)]
    keys = {"rank": 2, "update_proj_gap": gap, "spread_refresh": spread}
    optimizer = GaLore([{"params": params, **keys}], lr=1e-3)
    found = [[] for _ in params]
    for t in range(2 * gap + 1):
        old = [optimizer.state[p].get("projection_right") for p in params]
        for i, p in enumerate(params):
            p.grad = normal(12, 8, seed=100 * t + i)
        optimizer.step()
        for i, p in enumerate(params):
            if optimizer.state[p]["projection_right"] is not old[i]:
                found[i].append(t)
    return found


def test_a_spread_refresh_gives_each_matrix_a_step_of_its_own_and_the_same_gap():
    assert refreshes(spread=False) == [[0, 6, 12]] * 3
    spread = refreshes(spread=True)
    assert all(steps[0] == 0 for steps in spread)
    later = [steps[1:] for steps in spread]
    assert all(b - a == 6 for steps in later for a, b in itertools.pairwise(steps))
    assert len({steps[0] for steps in later}) == 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 30), (600, 8), (1100, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_channel_norms_are_the_norms(shape, dtype):
    X = normal(*shape).to(dtype)
    for axis in (0, 1, None):
        reference = torch.linalg.vector_norm(X.double(), dim=axis, keepdim=True)
        assert torch.allclose(channel_norms(X, axis).double(), reference, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_warm_refresh_captures_nearly_what_the_exact_one_does(decay):
    U, V = (torch.linalg.qr(normal(96, 96, seed=s))[0] for s in (0, 1))
    G = U * torch.arange(1, 97) ** -decay @ V.T
    old, _ = leading_subspaces(G + 0.3 * G.norm() / 96 * normal(96, 96, seed=2), 16, (True, False))
    warm, _ = randomized_subspaces(G, 16, (True, False), old=(old, None))
    exact, _ = leading_subspaces(G, 16, (True, False))
    captured = (warm.T @ G).square().sum() / (exact.T @ G).square().sum()
    assert captured >= (0.98 if decay else 0.95)
    assert torch.allclose(warm.T @ warm, torch.eye(16), atol=1e-5)
    assert ((warm * old).sum(0) >= 0).all()
