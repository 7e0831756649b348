"""Chains of stacks, compiled: a graph for each layout, none for events, and the same updates."""

import copy

import pytest
import torch
from compiling import counting
from optimizer_rows import ROWS
from torch import nn
from torch._dynamo.utils import counters

from lowrank_lab.device import cuda_path
from lowrank_lab.optim import chains, fira

SHAPES = [(16, 16), (24, 10), (10, 24), (16, 16), (24, 10), (24, 16)]
# rows of optimizer_rows.py, and the graphs of their chains
CHAINS = {
    "fira": 1, "fira subspace": 1, "fira reset std": 1, "fira transport std": 1, "apollo": 1,
    "apollo svd": 1, "apollo mini": 1, "spam": 1, "stable-spam": 1, "scale": 1,
    "scale momentum": 1, "normuon": 2, "normuon rms": 2,
}  # fmt: skip
WITHOUT = ("galore", "golore", "frugal", "ldadam")
MARKS = {"rank": 4, "norm_dim": 1, "use_muon": True}
STEPS = 12


def row_of(name):
    return next(row for row in ROWS if row.name == name)


class Trial:
    """Matrices, an optimizer for which everything rare happens soon, and random gradients."""

    def __init__(self, row, compiled, dtype=torch.float32):
        self.draws = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(s, generator=self.draws).to(dtype)) for s in SHAPES]
        keys = dict(row.keys)
        if row.kind != "whole":
            keys.setdefault(row.cls.marker, MARKS[row.cls.marker])
        if "refresh" in row.cls.group_defaults:
            keys.setdefault("refresh", "svd")
        self.row, self.keys = row, keys | row.soon
        self.optimizer = self.new(compiled)

    def new(self, compiled):
        found = self.row.cls([{"params": self.params, **self.keys}], lr=0.01)
        found.compile_chains = compiled
        return found

    def steps(self, steps, missing=()):
        """With another learning rate each, and without the gradient of the parameters `missing`."""
        for step in range(steps):
            self.optimizer.param_groups[0]["lr"] *= 0.9
            for i, p in enumerate(self.params):
                G = torch.randn(p.shape, generator=self.draws) * (1 + step % 3)
                p.grad = None if i in missing[step : step + 1] else G.to(p.dtype)
            with cuda_path():
                self.optimizer.step()
        return self

    def resume(self):
        """Go on with an optimizer that has loaded the state of the present one."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer = self.new(self.optimizer.compile_chains)
        self.optimizer.load_state_dict(saved)
        return self

    @property
    def result(self):
        states = [self.optimizer.state[p] for p in self.params]
        return [p.detach().clone() for p in self.params], states


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_one_graph_for_all_steps_and_all_that_happens_in_them(name, monkeypatch):
    """Refreshes, resets, warm-ups and rates; a resumed checkpoint compiles for itself."""
    with counting(monkeypatch, "aot_eager"):
        found = Trial(row_of(name), compiled=True).steps(STEPS)
        assert graphs() == CHAINS[name]
        found.resume().steps(STEPS)
        assert graphs() == 2 * CHAINS[name]
    plain = Trial(row_of(name), compiled=False).steps(STEPS).resume().steps(STEPS)
    torch.testing.assert_close(found.result, plain.result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_updates_of_products_and_fused_kernels_alone_have_no_graph(name, monkeypatch):
    with counting(monkeypatch, "aot_eager"):
        Trial(row_of(name), compiled=True).steps(2)
        assert graphs() == 0


@pytest.mark.parametrize("name", ["fira", "stable-spam", "scale", "normuon"])
def test_half_precision_agrees_to_its_rounding(name, monkeypatch):
    with counting(monkeypatch, "aot_eager"):
        found = Trial(row_of(name), compiled=True, dtype=torch.bfloat16).steps(4)
    plain = Trial(row_of(name), compiled=False, dtype=torch.bfloat16).steps(4)
    torch.testing.assert_close(found.result[0], plain.result[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", CHAINS)
def test_a_compiled_step_that_the_flag_turns_off_changes_no_weight_and_no_state(name, monkeypatch):
    with counting(monkeypatch, "aot_eager"):
        trial = Trial(row_of(name), compiled=True).steps(1)
        before = copy.deepcopy(trial.result)
        states = [dict(state) for state in before[1]]
        trial.optimizer.found_inf = torch.ones(())
        for p in trial.params:
            p.grad = torch.full_like(p, torch.nan)
        entries = [dict(trial.optimizer.state[p]) for p in trial.params]
        with cuda_path():
            trial.optimizer.step()
    for p, state, old in zip(trial.params, entries, states, strict=True):
        trial.optimizer.state[p].update(state)  # as the trainer puts replaced entries back
        assert trial.optimizer.state[p].keys() == old.keys()
    torch.testing.assert_close(trial.result[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close([dict(s) for s in trial.result[1]], states, rtol=0, atol=0)


def test_further_layouts_than_the_limit_are_not_compiled(monkeypatch):
    monkeypatch.setattr(chains, "MOST_GRAPHS", 3)
    missing = [0, 1, 2, 3, 4, 5, 0]  # the states then differ in age, and stacks in size
    with counting(monkeypatch, "aot_eager"):
        found = Trial(row_of("fira"), compiled=True).steps(8, missing)
        assert graphs() == 3
    plain = Trial(row_of("fira"), compiled=False).steps(8, missing)
    torch.testing.assert_close(found.result, plain.result, rtol=1e-5, atol=1e-6)


def test_single_tensors_are_not_compiled(monkeypatch):
    with counting(monkeypatch, "eager"):
        optimizer = fira.Fira([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}])
        optimizer.compile_chains = True
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert graphs() == 0


def test_a_copy_of_an_optimizer_compiles_for_itself(monkeypatch):
    with counting(monkeypatch, "aot_eager"):
        trial = Trial(row_of("fira"), compiled=True).steps(2)
        other = copy.deepcopy(trial.optimizer)
        other.compile_chains = True
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with cuda_path():
            other.step()
        assert graphs() == 2
