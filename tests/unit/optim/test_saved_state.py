"""A saved state loads into the optimizer that it fits; every other is refused, nothing changed."""

import copy
from itertools import product

import pytest
import torch
from optimizer_rows import GALORE, ROWS
from optimizer_trial import Trial, refuse
from small_matrices import TALL, WIDE, assert_equal_states
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler, swa_utils

from lowrank_lab import optim

FIRST_ROWS = list({row.cls: row for row in reversed(ROWS)}.values())  # no variants
OWN = [row for row in FIRST_ROWS if row.name != "combined"]

rows = pytest.mark.parametrize("row", FIRST_ROWS, ids=str)


def stepped(row, shape=TALL, **keys):
    return Trial(row, shape, **keys).advance(row.gradients(shape, 3))


PAIRS = [pair for pair in product(FIRST_ROWS, repeat=2) if pair[0] is not pair[1]]


@pytest.mark.parametrize(("saved", "into"), PAIRS, ids=str)
def test_a_state_of_another_class_is_refused(saved, into):
    refuse(stepped(into), stepped(saved).optimizer.state_dict(), "^state_dict: ")


RANKED = [row for row in ROWS if row.kind in ("ranked", "factors")]


@pytest.mark.parametrize("row", RANKED, ids=str)
def test_another_rank_is_refused(row):
    refuse(stepped(row, rank=4), stepped(row, rank=3).optimizer.state_dict(),
           r"^state_dict: rank: 3 is not allowed; 4, as in this optimizer's group$")  # fmt: skip


@rows
def test_another_shape_is_refused(row):
    refuse(stepped(row), stepped(row, shape=WIDE).optimizer.state_dict(),
           r"^state_dict: (exp_avg|parameter 0: 'without projection_right')")  # fmt: skip


@pytest.mark.parametrize("name", ["proj_type", "density"])
def test_another_layout_of_the_state_is_refused(name):
    row, value = {"proj_type": (GALORE, "left"), "density": (row_of("spam"), 0.5)}[name]
    message = f"^state_dict: {name}: "
    refuse(stepped(row), stepped(row, **{name: value}).optimizer.state_dict(), message)
    refuse(stepped(row, **{name: value}), stepped(row).optimizer.state_dict(), message)


def row_of(name):
    return next(row for row in ROWS if row.name == name)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "combined"], ids=str)
def test_a_state_without_one_of_its_entries_is_refused(row):
    whole = stepped(row).optimizer.state_dict()
    for i, entries in whole["state"].items():
        for key in entries:
            broken = copy.deepcopy(whole)
            del broken["state"][i][key]
            refuse(stepped(row), broken, f"^state_dict: parameter {i}: 'without {key}'")


@pytest.mark.parametrize("row", OWN, ids=str)
def test_an_unknown_entry_is_refused(row):
    state_dict = stepped(row).optimizer.state_dict()
    state_dict["state"][0]["max_exp_avg_sq"] = torch.zeros(3)
    refuse(stepped(row), state_dict, "^state_dict: parameter 0: 'with max_exp_avg_sq'")


@rows
@pytest.mark.parametrize(
    "break_", [
        lambda d: d.pop("state"), lambda d: d.pop("param_groups"), lambda d: d.clear(),
        lambda d: d["param_groups"].pop(), lambda d: d["param_groups"][0]["params"].append(7),
        lambda d: d["state"].update({9: d["state"][0]}),
    ],
)  # fmt: skip
def test_what_is_no_state_of_such_groups_is_refused(row, break_):
    state_dict = copy.deepcopy(stepped(row).optimizer.state_dict())
    break_(state_dict)
    refuse(stepped(row), state_dict, "^state_dict: ")


@pytest.mark.parametrize("value", [None, [], "state"])
def test_so_is_what_is_no_dict(value):
    refuse(stepped(GALORE), value, "^state_dict: ")


@pytest.mark.parametrize("row", OWN, ids=str)
@pytest.mark.parametrize(
    ("keys", "message"),
    [({"lr": -1.0}, "lr: -1.0"), ({"maximize": True}, "maximize: True"),
     ({"weight_deacy": 1}, "weight_deacy: 1 .*did you mean 'weight_decay'"),
     ({"params_": 1}, "params_: 1")],
)  # fmt: skip
def test_bad_values_and_unknown_keys_of_a_saved_group_are_refused(row, keys, message):
    state_dict = copy.deepcopy(stepped(row).optimizer.state_dict())
    state_dict["param_groups"][-1] |= keys
    refuse(stepped(row), state_dict, f"^state_dict: {message}")


@pytest.mark.parametrize("row", OWN, ids=str)
def test_keys_that_an_older_state_lacks_keep_their_values(row):
    trial, state_dict = stepped(row), stepped(row).optimizer.state_dict()
    kept = {"params", "rank", "lr", "betas", "correct_bias"}
    for group in state_dict["param_groups"]:
        for key in [k for k in group if k not in kept]:
            del group[key]
    groups = copy.deepcopy(trial.optimizer.param_groups)
    trial.optimizer.load_state_dict(state_dict)
    for one, other in zip(trial.optimizer.param_groups, groups, strict=True):
        assert {**one, "params": 0} == {**other, "params": 0}


@rows
def test_keys_that_torchs_schedulers_add_pass(row):
    one, other = stepped(row), stepped(row)
    lr_scheduler.OneCycleLR(one.optimizer, 0.1, 10, cycle_momentum=False)
    swa_utils.SWALR(one.optimizer, 0.01)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert {"initial_lr", "max_lr", "swa_lr"} <= other.optimizer.param_groups[0].keys()
    other.advance(row.gradients(TALL, 2))


def test_a_key_of_the_users_own_loads_where_the_group_has_it_too():
    one, other = stepped(GALORE), stepped(GALORE)
    one.optimizer.param_groups[0]["my_key"] = 1
    refuse(other, one.optimizer.state_dict(), "^state_dict: my_key: 1 is not allowed")
    other.optimizer.param_groups[0]["my_key"] = 2
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["my_key"] == 1


def test_parameters_that_never_had_a_gradient_have_no_state_to_load():
    one = Trial(GALORE)
    one.b.grad = torch.ones_like(one.b)
    one.optimizer.step()
    other = Trial(GALORE)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert [bool(state) for state in other.states] == [False, True]


def test_moments_follow_a_model_that_is_loaded_in_another_dtype():
    one, other = stepped(GALORE), Trial(GALORE, dtype=torch.bfloat16)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert {s[k].dtype for s in other.states for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    other.advance(GALORE.gradients(TALL, 2, torch.bfloat16))
    back = Trial(GALORE)
    back.optimizer.load_state_dict(other.optimizer.state_dict())
    back.advance(GALORE.gradients(TALL, 2))


def test_an_adamw_of_this_package_is_one_layout_for_all_plain_groups():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    one, other = optim.ProjectedAdamW([p]), optim.Fira([q])
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.state[q]["step"] == 1


def test_a_hook_of_the_users_may_adapt_a_state_before_it_is_checked():
    one, other = stepped(GALORE), stepped(GALORE)
    state_dict = one.optimizer.state_dict()
    renamed = {"groups": state_dict.pop("param_groups")}

    def hook(_, found):
        return found | {"param_groups": renamed["groups"]}

    refuse(other, state_dict | {"param_groups": []}, "^state_dict: ")
    handle = other.optimizer.register_load_state_dict_pre_hook(hook)
    other.optimizer.load_state_dict(state_dict | {"param_groups": []})
    handle.remove()
    other.optimizer.load_state_dict(stepped(GALORE).optimizer.state_dict())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls", [optim.GaLore, optim.Fira, optim.Apollo])
def test_the_state_dicts_of_torchs_distributed_checkpoints_load(cls, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = []
    for _ in range(2):
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 6), "head": torch.nn.Linear(6, 3)})
        optimizer = cls(optim.param_groups(model, rank=2, target="body"), lr=0.01)
        runs.append((model, optimizer))
    (model, optimizer), (other_model, other) = runs
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state_dict = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(other_model, other, state_dict, options=options)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_equal_states(optimizer.state[p], other.state[q])
