"""Whatever an optimizer keeps comes back from a checkpoint; what can't is refused before work."""

import math
import random
import sys
import types
from collections import deque
from enum import Enum

import numpy as np
import pytest
import pytorch_optimizer
import torch
from interruptions import assert_same, config_of
from torch import nn

from lowrank_lab import InputError, RunConfig, train
from lowrank_lab.memory.breakdown import persistent
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training import checkpoint
from lowrank_lab.training.optimizer_state import Decoder, Encoder
from lowrank_lab.training.optimizer_trial import try_optimizer

CPU = torch.device("cpu")


class Mode(Enum):
    WARM = 1
    COLD = 2


class Average:
    """A state that is an object."""

    def __init__(self, shape):
        self.mean, self.count, self.mode = torch.zeros(shape), 0, Mode.WARM


class Hoarder(torch.optim.Optimizer):
    """SGD with states of every kind, and more in its state_dict; each decides the next step."""

    def __init__(self, params, lr=1e-3, flag=False):
        super().__init__(params, {"lr": lr, "flag": flag, "pair": (1, [2.0])})
        self.steps = 0.0

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "steps"})

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 0.5
        self.state.setdefault("all", {"count": 0, "best": math.inf})["count"] += 1
        for group in self.param_groups:
            group["pair"] = (group["pair"][0] + 1, [group["pair"][1][0] / 2])
            for p in (p for p in group["params"] if p.grad is not None):
                self._update(p, group)

    def _update(self, p, group):
        s = self.state[p]
        if not s:
            shared = torch.zeros_like(p)
            s.update(
                queue=deque([shared], maxlen=3), nested=[None, {0.5: [p.grad * 0.1]}, (1, "x")],
                shared=shared, average=Average(p.shape), none=None, dtype=p.dtype, set={1, 2},
                weight=p, text="a", flag=True,
            )  # fmt: skip
        s["queue"].append(p.grad.clone())
        s["shared"].add_(1e-3)
        s["nested"][1][0.5][0].mul_(0.9)
        s["average"].mean.lerp_(p.grad.to(s["dtype"]), 0.1)
        s["average"].count += 1
        s["average"].mode = Mode.COLD if s["average"].count > 3 else Mode.WARM
        push = s["queue"][0] + s["nested"][1][0.5][0] + s["average"].mean + self.steps * 1e-3
        cold = 2 if s["average"].mode is Mode.COLD else 1
        noise = 1 + torch.rand(()) * group["pair"][1][0]
        s["weight"].sub_(push, alpha=group["lr"] * cold * float(noise) * self.state["all"]["count"])


class Closed(torch.optim.SGD):
    """Needs a closure, as LBFGS does."""

    def step(self, closure):
        return closure()


class Handles(torch.optim.SGD):
    """Has a state that is a file."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["file"] = open(__file__)  # noqa: PTH123, SIM115


def this_module():
    """A module of this name with the classes above: pytest imports this file under no name."""
    module = types.ModuleType(__name__)
    vars(module).update(Closed=Closed, Handles=Handles)
    return module


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(32, 16), nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 32)
    )


def steps(model, optimizer, begin, end):
    for step in range(begin, end):
        tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(make, folder, at=3, total=6):
    """Weights after an uninterrupted training and after one that was saved and loaded."""
    model = model_of()
    optimizer = make(model.parameters())
    steps(model, optimizer, 0, at)
    checkpoint.save(folder, at, model, optimizer)
    steps(model, optimizer, at, total)
    other = model_of(seed=1)
    again = make(other.parameters())
    assert checkpoint.load(folder, other, again)[0] == at
    steps(other, again, at, total)
    return [[*m.parameters()] for m in (model, other)]


# Those that take plain parameters and no closure, and that keep all of their state.
NEED_MORE = set(
    "AdaGO AdaHessian AdaLOMO AdaMuon AdamMini AliG BSAM BaseOptimizer DeMo DistributedMuon "
    "FriendlySAM GSAM LBFGS LOMO LoRARite LookSAM Lookahead Muon MuonClip NorMuon OrthoGrad PCGrad "
    "Ranger21 SAM SafeFP16Optimizer ScheduleFreeWrapper SophiaH SpectralSphere TRAC WSAM".split()
)
CLASSES = sorted(
    name for name, cls in vars(pytorch_optimizer).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in NEED_MORE
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_of_a_package_goes_on_as_if_undisturbed(name, tmp_path):
    ours, theirs = resumed(lambda p: getattr(pytorch_optimizer, name)(p, lr=1e-3), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Chancy(torch.optim.SGD):
    """Draws from the global generators of torch, numpy and Python."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                drawn = random.gauss(0, 1) + np.random.normal() + np.random.random()
                p.add_(p.grad * drawn * torch.rand(()), alpha=-group["lr"])


def test_an_optimizer_that_draws_from_any_global_generator_goes_on_with_the_same_numbers(tmp_path):
    ours, theirs = resumed(lambda p: Chancy(p, lr=0.1), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_states_of_every_kind_come_back(tmp_path):
    ours, theirs = resumed(Hoarder, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_checkpoint_has_is_what_was_saved(tmp_path):
    model, other = model_of(), model_of(seed=1)
    optimizer, again = (Hoarder(m.parameters()) for m in (model, other))
    steps(model, optimizer, 0, 5)
    checkpoint.save(tmp_path, 5, model, optimizer)
    checkpoint.load(tmp_path, other, again)
    weight, twin = next(model.parameters()), next(other.parameters())
    state, found = optimizer.state[weight], again.state[twin]
    assert found.keys() == state.keys()
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in state.items()}
    assert found["queue"].maxlen == 3
    assert found["queue"][0].equal(state["queue"][0])
    assert found["weight"] is twin  # a reference to the parameter, not a copy
    assert (found["dtype"], found["set"]) == (torch.float32, {1, 2})
    assert found["average"].mode is Mode.COLD
    assert again.state["all"] == {"count": 5, "best": math.inf}
    assert again.param_groups[0]["pair"] == optimizer.param_groups[0]["pair"]


def test_a_tensor_in_two_places_stays_one(tmp_path):
    model, other = model_of(), model_of(seed=1)
    optimizer, again = (torch.optim.SGD(m.parameters()) for m in (model, other))
    tensor = torch.ones(3)
    optimizer.state[next(model.parameters())] = {"a": tensor, "b": [tensor]}
    checkpoint.save(tmp_path, 1, model, optimizer)
    checkpoint.load(tmp_path, other, again)
    state = again.state[next(other.parameters())]
    assert state["a"] is state["b"][0]


def test_lists_of_earlier_checkpoints_are_read():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters())
    tensors = {"optimizer/0.weight/Q#0": torch.ones(2), "optimizer/0.weight/m": torch.zeros(2)}
    facts = {"optimizer": {"0.weight/Q": {"items": [None, 3, None]}, "0.weight/n": 4}}
    Decoder(model, optimizer, tensors).load({**facts, "groups": [{"lr": 0.5}]})
    state = optimizer.state[model[0].weight]
    assert state["Q"][0].equal(torch.ones(2))
    assert (state["Q"][1:], state["n"], state["m"].tolist()) == ([3, None], 4, [0, 0])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_state_that_refers_to_itself_is_refused_and_counted_once():
    model = model_of()
    optimizer, average = Hoarder(model.parameters()), Average((3,))
    average.loop = [average]
    optimizer.state[model[0].weight] = {"average": average}
    with pytest.raises(InputError, match="refers to itself"):
        Encoder(model, optimizer).states()
    assert persistent(model, optimizer).optimizer_states == 12


def test_a_checkpoint_makes_no_class_from_elsewhere():
    model = model_of()
    decoder = Decoder(model, torch.optim.SGD(model.parameters()), {})
    for path in (["subprocess", "Popen"], ["torch.nn", "Linear"], ["torch", "Tensor"]):
        with pytest.raises(InputError, match="no class of the optimizer's"):
            decoder.decode({"object": path, "items": []}, CPU)


def test_all_tensors_of_states_are_counted():
    model = model_of()
    optimizer = Hoarder(model.parameters())
    steps(model, optimizer, 0, 5)
    size = sum(4 * p.numel() for p in model.parameters())
    # three gradients, one average, one nested tensor, one shared; the parameter is none of them
    assert persistent(model, optimizer).optimizer_states == 6 * size
    soap = pytorch_optimizer.SOAP(model.parameters(), lr=1e-3)
    steps(model, soap, 0, 3)
    listed = sum(t.nbytes for s in soap.state.values() for k in ("GG", "Q") for t in s[k]
                 if isinstance(t, torch.Tensor))  # fmt: skip
    moments = sum(v.nbytes for s in soap.state.values() for v in s.values()
                  if isinstance(v, torch.Tensor))  # fmt: skip
    assert listed > 0
    assert persistent(model, soap).optimizer_states == listed + moments


OWN = "pytorch_optimizer"


@pytest.mark.parametrize("name", [f"{OWN}.SOAP", f"{OWN}.StableSPAM", f"{OWN}.AdaShift"])
def test_a_run_with_it_goes_on_as_if_undisturbed(name, tmp_path, undisturbed):
    config = config_of(optimizer=name, reset_every=0, lr=1e-3)

    def stop(row):
        if row["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_step=stop)
    assert_same(train(config, tmp_path), undisturbed(config))


@pytest.mark.parametrize(
    ("optimizer", "options", "said"),
    [
        (f"{__name__}.Closed", {}, "it can't step: TypeError"),
        (f"{__name__}.Handles", {}, "TextIOWrapper, which no checkpoint can have"),
        ("torch.optim.LBFGS", {}, "optimizer"),
        (f"{OWN}.AdaHessian", {}, "it can't step"),
        (f"{OWN}.AliG", {}, "closure"),
        (f"{OWN}.SAM", {}, "base_optimizer"),
    ],
)
def test_what_cannot_train_or_be_saved_is_refused_before_any_work(
    optimizer, options, said, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or this_module())
    config = RunConfig(
        model="tiny", corpus="markov", steps=20, optimizer=optimizer, optimizer_options=options
    )
    with pytest.raises(InputError, match="optimizer") as caught:
        train(config, tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_trial_changes_no_random_numbers():
    config = resolve(RunConfig(model="tiny", corpus="markov", optimizer=f"{OWN}.Lamb"))
    before = torch.get_rng_state()
    try_optimizer(config, CPU)
    assert torch.equal(torch.get_rng_state(), before)
