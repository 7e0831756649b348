"""The number of a parameter in its optimizer, on which seeds and spread refreshes depend."""

import copy

import pytest
import torch
from torch import nn

from lowrank_lab.optim import Apollo, GaLore, GoLore, ProjectedAdamW, Spam
from lowrank_lab.optim.dtensor_optimizer import param_index


class Counted(list):
    """A list that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def matrices(count, dtype=torch.float32):
    params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.eye(4, dtype=dtype)
    return params


@pytest.mark.parametrize(
    ("method", "keys", "options"),
    [
        (Apollo, {"rank": 2}, {}),
        (GoLore, {"rank": 2}, {}),
        (GaLore, {"rank": 2, "spread_refresh": True}, {}),
        (ProjectedAdamW, {}, {"stochastic_rounding": True}),
        (Spam, {"density": 0.5}, {}),
    ],
)
def test_a_step_goes_through_the_parameters_as_often_for_many_as_for_few(method, keys, options):
    passes = []
    for count in (2, 30):
        params = matrices(count, torch.bfloat16 if options else torch.float32)
        optimizer = method([{"params": params, **keys}], lr=0.1, **options)
        counted = optimizer.param_groups[0]["params"] = Counted(params)
        optimizer.step()
        passes.append(counted.passes)
    assert passes[0] == passes[1] < 10


def test_numbers_follow_the_groups_as_these_change():
    first, second, third = matrices(3)
    optimizer = ProjectedAdamW([first], lr=0.1)
    optimizer.add_param_group({"params": [second]})
    assert [param_index(optimizer, p) for p in (first, second)] == [1, 2]
    optimizer.param_groups[0]["params"].append(third)
    assert [param_index(optimizer, p) for p in (first, third, second)] == [1, 2, 3]
    optimizer.param_groups[1]["params"][0] = replaced = matrices(1)[0]
    assert param_index(optimizer, replaced) == 3


def test_a_copy_of_an_optimizer_numbers_its_own_parameters():
    params = matrices(2)
    optimizer = Apollo([{"params": params, "rank": 2}], lr=0.1)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    numbers = [param_index(other, p) for p in other.param_groups[0]["params"]]
    assert numbers == [1, 2]
