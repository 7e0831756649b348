"""Several optimizers as one: later groups, copies, pickles and states."""

import copy
import pickle

import pytest
import torch
from small_matrices import TALL, gradients
from torch import nn

from lowrank_lab.optim import Combined, GaLore, Spam


def made(named=False, **keys):
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL[0]))
    matrix, rest = ([("W", W)], [("b", b)]) if named else ([W], [b])
    group = {"params": matrix, "rank": 3, "update_proj_gap": 4, **keys}
    return Combined(GaLore([group], lr=0.01), torch.optim.AdamW(rest, lr=0.01))


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps, start=0):
    for G in gradients(TALL, start + steps)[start:]:
        for p in params_of(optimizer):
            p.grad = G.clone() if p.ndim == 2 else G.sum(1)[: p.numel()].clone()
        optimizer.step()
    return [p.detach().clone() for p in params_of(optimizer)]


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_trains_on_by_itself_bit_for_bit(copied):
    optimizer = made()
    train(optimizer, 5)
    other = copied(optimizer)
    before = [p.detach().clone() for p in params_of(optimizer)]
    after = train(other, 5, 5)
    assert equal(params_of(optimizer), before)
    assert equal(train(optimizer, 5, 5), after)
    for group in other.param_groups:
        group["lr"] = 0.0
    assert equal(train(other, 1), after)


def test_a_state_goes_on_bit_for_bit_after_a_group_was_added_to_each():
    runs = []
    for _ in range(2):
        optimizer = made()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(TALL))], "rank": 2}, to=0)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))], "lr": 0.1}, to=1)
        runs.append(optimizer)
    one, other = runs
    assert [len(o.param_groups) for o in one.optimizers] == [2, 2]
    train(one, 6)
    for p, q in zip(params_of(one), params_of(other), strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert equal(train(one, 6, 6), train(other, 6, 6))
    assert [len(o.param_groups) for o in other.optimizers] == [2, 2]


@pytest.mark.parametrize("to", [None, 2, -1])
def test_a_later_group_needs_the_number_of_its_optimizer(to):
    optimizer, p = made(), nn.Parameter(torch.ones(3))
    keys = {} if to is None else {"to": to}
    with pytest.raises(ValueError, match=f"^to: {to} is not allowed; .*0 for GaLore, 1 for AdamW"):
        optimizer.add_param_group({"params": [p]}, **keys)
    assert len(optimizer.param_groups) == 2


BAD = [
    (0, {"rank": 50}, "rank: 50"), (0, {"ranks": 2}, "ranks: 2.*'rank'"),
    (1, {"ranks": 2}, "ranks: 2"), (1, {"weight_deacy": 1}, "weight_deacy.*'weight_decay'"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "keys", "message"), BAD)
def test_a_bad_later_group_is_refused_and_changes_nothing(to, keys, message):
    optimizer = made()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], **keys}, to=to)
    assert [len(o.param_groups) for o in (optimizer, *optimizer.optimizers)] == [2, 1, 1]


def test_a_parameter_of_one_optimizer_is_refused_in_another():
    optimizer = made()
    W = optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": W}, to=1)
    assert [len(o.param_groups) for o in (optimizer, *optimizer.optimizers)] == [2, 1, 1]
    train(optimizer, 2)


def test_states_from_before_it_was_combined_are_kept():
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL[0]))
    galore, adamw = GaLore([{"params": [W], "rank": 3}]), torch.optim.AdamW([b])
    W.grad, b.grad = torch.ones(TALL), torch.ones(TALL[0])
    galore.step()
    adamw.step()
    assert Combined(galore, adamw).state.keys() == {W, b}


def test_combined_optimizers_are_not_combined_again():
    with pytest.raises(ValueError, match=r"^optimizers: .Combined. is not allowed"):
        Combined(made())


def test_a_misspelt_key_of_torchs_optimizer_is_refused():
    group = {"params": [nn.Parameter(torch.ones(3))], "weight_deacy": 0.1}
    with pytest.raises(ValueError, match=r"^weight_deacy: .*did you mean 'weight_decay'"):
        Combined(torch.optim.AdamW([group]))


def test_wide_moments_of_narrow_weights_stay_wide():
    runs = []
    for _ in range(2):
        W = nn.Parameter(torch.ones(TALL, dtype=torch.bfloat16))
        groups = [{"params": [W], "rank": 3}]
        runs.append(Combined(GaLore(groups, state_precision="fp32")))
    W.grad = torch.ones_like(W)
    runs[1].step()
    runs[0].load_state_dict(runs[1].state_dict())
    state = runs[0].state[runs[0].param_groups[0]["params"][0]]
    assert state["exp_avg"].dtype == torch.float32
    assert state["projection_right"].dtype == torch.bfloat16


def swapped():
    optimizer = made()
    return Combined(*reversed(optimizer.optimizers))


def with_muon():
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL[0]))
    return Combined(torch.optim.Muon([W]), torch.optim.AdamW([b]))


def other_shape():
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(7))
    group = {"params": [W], "rank": 3, "update_proj_gap": 4}
    return Combined(GaLore([group]), torch.optim.AdamW([b]))


FOREIGN = {
    "swapped": (swapped, "rank: None"), "muon": (with_muon, "rank: None|.*groups of"),
    "rank": (lambda: made(rank=4), "rank: 4"), "shape": (other_shape, r"exp_avg\w* of parameter 0"),
    "spam": (lambda: Spam([nn.Parameter(torch.ones(2))]), r"\[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_states_of_other_combinations_are_refused_and_nothing_changes(case):
    make, message = FOREIGN[case]
    optimizer, other = made(), make()
    before = train(optimizer, 2)
    train(other, 2)
    with pytest.raises(ValueError, match=f"^state_dict: ({message})"):
        optimizer.load_state_dict(other.state_dict())
    twin = made()
    train(twin, 2)
    assert equal(before, params_of(twin))
    assert equal(train(optimizer, 6, 2), train(twin, 6, 2))


def test_names_of_parameters_are_kept():
    optimizer = made(named=True)
    assert [g["param_names"] for g in optimizer.param_groups] == [["W"], ["b"]]
    assert [g["param_names"] for g in optimizer.state_dict()["param_groups"]] == [["W"], ["b"]]


@pytest.mark.parametrize(
    "copied", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
@pytest.mark.parametrize("which", [0, 1])
def test_a_state_loaded_into_one_of_the_optimizers_counts(copied, which):
    if which == 0:
        group = {"params": [nn.Parameter(torch.ones(TALL))], "rank": 3, "update_proj_gap": 4}
        alone = GaLore([group], lr=0.02)
    else:
        alone = torch.optim.AdamW([nn.Parameter(torch.ones(TALL[0]))], lr=0.02)
    train(alone, 5)
    optimizer = copied(made())
    train(optimizer, 2)
    optimizer.optimizers[which].load_state_dict(alone.state_dict())
    assert optimizer.param_groups[which] is optimizer.optimizers[which].param_groups[0]
    assert optimizer.param_groups[which]["lr"] == 0.02
    saved = optimizer.state_dict()["state"]
    moments = next(iter(alone.state.values()))["exp_avg"]
    assert torch.equal(saved[which]["exp_avg"], moments)
    assert all(o.state is optimizer.state for o in optimizer.optimizers)
    other = made()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        q.data.copy_(p.data)
    assert equal(train(optimizer, 4, 5), train(other, 4, 5))
