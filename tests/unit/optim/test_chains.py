"""Chains on vectors, compiled: one graph each for all steps and stacks, and the same updates."""

import pytest
import torch
from compiling import counting
from optimizer_rows import ROWS
from torch import nn
from torch._dynamo.utils import counters

from lowrank_lab.device import cuda_path
from lowrank_lab.optim import apollo, fira, spam, stable_spam
from lowrank_lab.optim.chains import Chain

SHAPES = [(16, 16), (24, 10), (10, 24), (16, 16), (24, 10), (24, 16)]
# rows of optimizer_rows.py, and the number of their chains
CHAINS = {"fira": 2, "apollo": 2, "apollo mini": 2, "spam": 1, "stable-spam": 2, "galore": 0}


@pytest.fixture(autouse=True)
def forgotten():
    """Chains that no test before has compiled."""
    for module in (fira, apollo, spam, stable_spam):
        for chain in vars(module).values():
            if isinstance(chain, Chain):
                chain._graph = None


def trained(row, compiled, steps=10):
    """Weights and states after steps with refreshes, resets, rates, and stacks of other sizes."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    rank = {} if row.kind == "whole" else {"rank": 4}
    refresh = {"refresh": "svd"} if "refresh" in row.cls.group_defaults else {}
    optimizer = row.cls([{"params": params, **row.keys, **row.soon, **refresh, **rank}], lr=0.01)
    optimizer.compile_chains = compiled
    for step in range(steps):
        optimizer.param_groups[0]["lr"] *= 0.9
        for i, p in enumerate(params):
            G = torch.randn(p.shape, generator=generator) * (1 + step % 3)
            p.grad = None if i == step else G  # the states then differ in age
        with cuda_path():
            optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_one_graph_for_all_steps_and_stacks(name, monkeypatch):
    row = next(row for row in ROWS if row.name == name)
    with counting(monkeypatch, "aot_eager"):
        found = trained(row, compiled=True)
        assert counters["stats"]["unique_graphs"] == CHAINS[name]
        assert not counters["graph_break"]
    plain = trained(row, compiled=False)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_single_tensors_are_not_compiled(monkeypatch):
    with counting(monkeypatch, "eager"):
        optimizer = fira.Fira([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}])
        optimizer.compile_chains = True
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not counters["stats"]["unique_graphs"]
