"""Restarts of known optimizers equal new ones; all other optimizers are refused unchanged."""

import contextlib
import copy
import functools
import inspect
import re
import warnings
from typing import ClassVar

import apollo_torch
import fira
import galore_torch
import numpy as np
import pytest
import pytorch_optimizer
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_lab import optim, reset_momentum_
from lowrank_lab.techniques import prune_moments_
from lowrank_lab.techniques.layouts import LAYOUTS, short_name
from lowrank_lab.techniques.momentum import MOMENTS

# Arguments of classes that need some, or that have states only with them.
GIVEN = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adam": {"amsgrad": True},
    "torch.ASGD": {"t0": 2},
    "SGDP": {"momentum": 0.9},
    "SGDW": {"momentum": 0.9},
    "PID": {"momentum": 0.9},
    "AliG": {"max_lr": 0.1, "momentum": 0.9},
    "APOLLO": {"lr": 1e-3},
    "QHM": {"momentum": 0.9, "nu": 0.7},
    "Amos": {"momentum": 0.9},
    "ScheduleFreeAdamW": {"ams_bound": True},
}
PARTIAL = {f"torch.{name}" for name in ("Adam", "AdamW", "RAdam", "SGD", "Muon")}
PRUNED = PARTIAL | {"torch.NAdam"}
MUONS = ("Muon", "AdaGO", "AdaMuon", "NorMuon")


def classes(*modules):
    """The optimizer classes of modules, by package and name."""
    found = {}
    for module in modules:
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer):
                found[short_name(cls)] = cls
    del found["torch.Optimizer"]
    return found


CLASSES = classes(torch.optim, pytorch_optimizer) | {
    "transformers.Adafactor": transformers.Adafactor,
    "galore_torch.AdamW": galore_torch.GaLoreAdamW,
    "galore_torch.Adafactor": galore_torch.GaLoreAdafactor,
    "fira.AdamW": fira.FiraAdamW,
    "apollo_torch.AdamW": apollo_torch.APOLLOAdamW,
}
ELSEWHERE = {"torch.SparseAdam", "torch.LBFGS"}  # have tests of their own
KNOWN = sorted(
    name
    for name, cls in CLASSES.items()
    if name not in ELSEWHERE
    and (name in LAYOUTS or name == "torch.AdamW")  # a subclass of Adam with its step
)  # fmt: skip
UNKNOWN = sorted(CLASSES.keys() - set(KNOWN) - ELSEWHERE)


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(0.3 * torch.randn(12, 8)), nn.Parameter(0.3 * torch.randn(6, 12))]


def built(name, params, **more):
    """The optimizer of that name, with arguments that give it all its states."""
    cls = CLASSES[name]
    options = {**GIVEN.get(cls.__name__, {}), **GIVEN.get(name, {}), **more}
    groups = params
    if name.startswith("pytorch_optimizer") and cls.__name__ in MUONS:
        groups = [
            {"params": params[:1], "use_muon": True},
            {"params": params[1:], "use_muon": False},
        ]
    elif name.startswith(("galore_torch", "fira", "apollo_torch")):
        keys = {"rank": 3, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
        keys |= {"proj": "svd", "scale_type": "channel"} if name.startswith("apollo") else {}
        keys |= {"alpha": 1.0} if name.startswith("fira") else {}
        groups = [{"params": params, **keys}]
    with warnings.catch_warnings(action="ignore"):
        if name == "fira.AdamW":
            options |= {"no_deprecation_warning": True}
        return cls(groups, **options)


def train(params, optimizer, steps, seed):
    torch.manual_seed(seed)  # some optimizers draw random numbers
    np.random.seed(seed)
    for step in range(steps):
        X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * seed + step))

        def closure(X=X):
            for p in params:
                p.grad = None
            loss = (params[1] @ torch.tanh(params[0] @ X)).square().mean()
            loss.backward(create_graph=type(optimizer).__name__ == "AdaHessian")
            return loss

        loss = closure()
        closures = {"AliG": lambda loss=loss: float(loss), "LBFGS": closure}
        optimizer.step(closures.get(type(optimizer).__name__))
    for p in params:
        p.grad = None
    return loss


def twin(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def equal(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", KNOWN)
def test_a_full_reset_equals_a_new_optimizer(name):
    (ours, optimizer), (on, unreset) = started(name), started(name)
    before, others = twin(ours), twin(ours)
    assert reset_momentum_(optimizer) > 0
    assert equal(ours, before)  # a reset changes no weights
    fresh = built(name, others)
    for params, each in ((ours, optimizer), (others, fresh), (on, unreset)):
        train(params, each, 12, seed=2)
    assert equal(ours, others)
    assert not equal(ours, on)  # the reset mattered


def started(name, **more):
    """Parameters and their optimizer after 7 steps."""
    params = weights()
    optimizer = built(name, params, **more)
    train(params, optimizer, 7, seed=1)
    return params, optimizer


def contents(optimizer):
    """A copy of all that an optimizer has: its states, its groups, and their parameters."""
    states = {id(p): dict(state) for p, state in optimizer.state.items()}
    return copy.deepcopy((states, [dict(group) for group in optimizer.param_groups]))


def unchanged(before, after):
    """Whether two copies show the same; addresses of objects differ."""
    ours, theirs = (re.sub(" at 0x[0-9a-f]+>", ">", str(x)) for x in (before, after))
    return ours == theirs


def filled(cls, params):
    """An optimizer of a class that may need anything, with moments of common names."""
    optimizer = cls.__new__(cls)
    group = {"params": params, "lr": 0.1, "betas": (0.9, 0.999)}
    inner = torch.optim.SGD([group])
    state = {p: {"exp_avg": p.detach() + 1, "exp_avg_sq": p.detach() + 1} for p in params}
    optimizer.__dict__ |= {"optimizer": inner, "_state": {}, "defaults": {}}
    with contextlib.suppress(AttributeError):  # a property, which leads to the inner one
        optimizer.param_groups = inner.param_groups
    with contextlib.suppress(AttributeError):
        optimizer.state = state
    inner.state.update(state)
    return optimizer


@pytest.mark.parametrize("name", UNKNOWN)
def test_all_other_optimizers_are_refused_in_one_line_and_nothing_changes(name):
    params = weights()
    optimizer = filled(CLASSES[name], params)
    before = contents(optimizer)
    prune = functools.partial(prune_moments_, params=params, keep=0.1)
    for change in (reset_momentum_, functools.partial(reset_momentum_, strength=0.5), prune):
        with pytest.raises(ValueError, match=r"^optimizer: \w+ is not allowed; .+$") as refusal:
            change(optimizer)
        assert "\n" not in str(refusal.value)
    assert unchanged(before, contents(optimizer))


def test_most_optimizers_are_known():
    assert len(KNOWN) >= 118
    assert {"pytorch_optimizer.Ranger21", "pytorch_optimizer.Lookahead"} <= set(UNKNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_part_of_a_reset_is_defined_or_refused_and_nothing_changes(name):
    params, optimizer = started(name)
    before = contents(optimizer)
    fresh = built(name, twin(params))
    if name in PARTIAL:
        assert reset_momentum_(fresh, 0.5) == 0  # it has no moments yet
        assert reset_momentum_(optimizer, 0.5) == 2
        assert not unchanged(before, contents(optimizer))
        return
    with pytest.raises(ValueError, match=r"^strength: 0.5 is not allowed; "):
        reset_momentum_(fresh, 0.5)  # before the first step as well
    with pytest.raises(ValueError, match=r"^strength: 0.5 is not allowed; \w+ only restarts as a"):
        reset_momentum_(optimizer, 0.5)
    assert unchanged(before, contents(optimizer))
    train(params, optimizer, 1, seed=3)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_alone_is_reset_or_refused_and_nothing_changes(name, moment):
    optimizer = started(name)[1]
    before = contents(optimizer)
    if name in ("torch.SGD", "torch.Muon") and moment == "exp_avg":
        assert reset_momentum_(optimizer, moments=(moment,)) == 2
        return
    with pytest.raises(ValueError, match=r"^moments: "):
        reset_momentum_(optimizer, moments=(moment,))
    assert unchanged(before, contents(optimizer))


@pytest.mark.parametrize("name", KNOWN)
def test_one_parameter_alone_restarts_or_is_refused_and_nothing_changes(name):
    params, optimizer = started(name)
    before = contents(optimizer)
    if name.startswith("pytorch_optimizer") and len(optimizer.param_groups) == 1:
        with pytest.raises(ValueError, match=r"^params: a part of a group is not allowed; "):
            reset_momentum_(optimizer, params=params[:1])
        assert unchanged(before, contents(optimizer))
        return
    other = copy.deepcopy(optimizer.state[params[1]])
    assert reset_momentum_(optimizer, params=params[:1]) == 1
    assert unchanged(other, optimizer.state[params[1]])
    assert not unchanged(before, contents(optimizer))


@pytest.mark.parametrize("name", KNOWN)
def test_pruning_reaches_every_moment_or_is_refused_and_nothing_changes(name):
    params, optimizer = started(name)
    before = contents(optimizer)
    if name not in PRUNED:
        with pytest.raises(ValueError, match=r"^optimizer: \w+ is not allowed; its states are not"):
            prune_moments_(optimizer, params, 0.25)
        assert unchanged(before, contents(optimizer))
        return
    assert prune_moments_(optimizer, params, 0.25) == 2
    for p in params:
        shaped = [v for v in optimizer.state[p].values() if getattr(v, "shape", None) == p.shape]
        survivors = [v != 0 for v in shaped]
        assert shaped
        assert all(torch.equal(s, survivors[0]) for s in survivors)
        assert survivors[0].sum() == round(0.25 * p.numel())
    train(params, optimizer, 2, seed=3)
    assert all(p.isfinite().all() for p in params)


# Options, wrappers and subclasses


OPTIONS = {
    "dampening": ("torch.SGD", {"dampening": 0.3}),
    "nesterov": ("torch.SGD", {"nesterov": True, "weight_decay": 0.1}),
    "plain RMSprop": ("torch.RMSprop", {"momentum": 0.0, "centered": False}),
    "fused": ("torch.AdamW", {"fused": True, "amsgrad": False}),
    "for each": ("torch.NAdam", {"foreach": True, "decoupled_weight_decay": True}),
    "differentiable": ("torch.RAdam", {"weight_decay": 0.1, "foreach": False}),
    "long ASGD": ("torch.ASGD", {"t0": 1e6, "weight_decay": 0.1}),
    "Adafactor of transformers": ("transformers.Adafactor", {"beta1": 0.9}),
    "AMSBound": ("pytorch_optimizer.AdaBelief", {"ams_bound": True}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_a_full_reset_is_a_restart_with_other_options_too(name, options):
    params, optimizer = started(name, **options)
    others = twin(params)
    reset_momentum_(optimizer)
    train(params, optimizer, 9, seed=2)
    train(others, built(name, others, **options), 9, seed=2)
    assert equal(params, others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(PARTIAL | {"torch.NAdam", "torch.Adamax", "torch.Adagrad"}))
def test_a_restart_is_exact_in_other_precisions_and_after_zero_gradients(name, dtype):
    params = [nn.Parameter(p.detach().to(dtype)) for p in weights()]
    optimizer = built(name, params)
    for step in range(4):
        for p in params:
            p.grad = torch.full_like(p, step % 2)
        optimizer.step()
    others = twin(params)
    reset_momentum_(optimizer)
    fresh = built(name, others)
    for step in range(4):
        for p in params + others:
            p.grad = torch.full_like(p, (step + 1) % 2)
        optimizer.step(), fresh.step()
    assert equal(params, others)


def test_lbfgs_restarts_as_a_whole():
    params, optimizer = started("torch.LBFGS")
    others = twin(params)
    with pytest.raises(ValueError, match=r"^params: a part of a group is not allowed; LBFGS has"):
        reset_momentum_(optimizer, params=params[1:])
    assert reset_momentum_(optimizer) == 1
    train(params, optimizer, 3, seed=2)
    train(others, built("torch.LBFGS", others), 3, seed=2)
    assert equal(params, others)


def test_sparse_adam_restarts():
    def steps(embedding, optimizer, seed):
        for step in range(5):
            index = torch.arange(4) * 3 + (step + seed) % 3
            optimizer.zero_grad()
            (embedding(index).pow(2).sum() * (step + 1)).backward()
            optimizer.step()

    torch.manual_seed(0)
    ours = nn.Embedding(13, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(ours.parameters(), lr=0.1)
    steps(ours, optimizer, 0)
    other = copy.deepcopy(ours)
    assert reset_momentum_(optimizer) == 1
    fresh = torch.optim.SparseAdam(other.parameters(), lr=0.1)
    steps(ours, optimizer, 1), steps(other, fresh, 1)
    assert torch.equal(ours.weight, other.weight)


def accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(optimizer)


def of_lightning(optimizer):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


WRAPPERS = {"accelerate": accelerated, "Lightning": of_lightning}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_optimizer_is_reset_pruned_and_carried_as_the_one_within(wrap):
    (ours, optimizer), (theirs, plain) = started("torch.NAdam"), started("torch.NAdam")
    wrapped = wrap(optimizer)
    assert type(wrapped) is not type(optimizer)
    for each, params in ((wrapped, ours), (plain, theirs)):
        assert prune_moments_(each, params, 0.5) == 2
        assert reset_momentum_(each, params=params[:1]) == 1
        train(params, plain if each is plain else optimizer, 4, seed=2)
    assert equal(ours, theirs)
    with pytest.raises(ValueError, match=r"strength: 0.5 is not allowed; NAdam only restarts"):
        reset_momentum_(wrapped, 0.5)


def test_each_optimizer_of_a_combined_one_is_reset_by_its_own_rule():
    params = weights()
    parts = torch.optim.Muon(params[:1], lr=0.1), built("torch.NAdam", params[1:])
    optimizer = optim.Combined(*parts)
    train(params, optimizer, 5, seed=1)
    others = twin(params)
    assert reset_momentum_(optimizer) == 2
    fresh = optim.Combined(torch.optim.Muon(others[:1], lr=0.1), built("torch.NAdam", others[1:]))
    train(params, optimizer, 5, seed=2)
    train(others, fresh, 5, seed=2)
    assert equal(params, others)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"^strength: 0.5 .* NAdam"):  # nor is Muon changed
        reset_momentum_(optimizer, 0.5)
    assert unchanged(before, contents(optimizer))


class Renamed(torch.optim.Adam):
    """Adam with other defaults."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, betas=(0.5, 0.9))


class Stepping(torch.optim.Adam):
    """Has a step of its own, which may do anything."""

    def step(self, closure=None):
        return super().step(closure)


class Remembering(Renamed):
    """Adds a state."""

    def __init__(self, params):
        super().__init__(params)
        self.register_step_post_hook(self._remember)

    @staticmethod
    def _remember(self, args, kwargs):
        for state in self.state.values():
            state["remembered"] = state["exp_avg"].clone()


class Declared(Stepping):
    """Says itself what its states are."""

    state_layout: ClassVar = {"first": ("exp_avg",), "others": ("exp_avg_sq",), "counts": ("step",)}


def test_a_subclass_is_known_if_it_neither_steps_otherwise_nor_adds_states():
    found = {}
    for cls in (Renamed, Stepping, Remembering, Declared):
        params = weights()
        optimizer = cls(params)
        train(params, optimizer, 3, seed=1)
        before = contents(optimizer)
        try:
            found[cls] = reset_momentum_(optimizer)
        except ValueError as refusal:
            found[cls] = str(refusal).partition(";")[2]
            assert unchanged(before, contents(optimizer))
    assert (found[Renamed], found[Declared]) == (2, 2)
    assert found[Stepping].startswith(" a restart is known for the optimizers of torch.optim,")
    assert found[Remembering] == " a restart of its state 'remembered' isn't known"


def test_parameters_that_an_optimizer_does_not_hold_are_refused_unless_they_are_frozen():
    params, optimizer = started("torch.Adam")
    before = contents(optimizer)
    frozen, stranger = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    for change in (reset_momentum_, functools.partial(prune_moments_, keep=0.1)):
        with pytest.raises(ValueError, match=r"it doesn't hold 1 of the trainable parameters$"):
            change(optimizer, params=[*params, frozen, stranger])
        assert unchanged(before, contents(optimizer))
    assert prune_moments_(optimizer, [*params, frozen], 0.5) == 2
    assert reset_momentum_(optimizer, params=[*params, frozen]) == 2


def test_the_maximum_of_amsgrad_is_pruned_with_the_second_moments():
    params, optimizer = started("torch.Adam")
    prune_moments_(optimizer, params, 0.25, moments=("exp_avg", "exp_avg_sq"))
    for state in optimizer.state.values():
        assert torch.equal(state["max_exp_avg_sq"] != 0, state["exp_avg"] != 0)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_quantized_moments_restart(name):
    make = getattr(pytest.importorskip("torchao.optim"), name)

    def steps(weight, optimizer, seed):
        for step in range(3):
            chance = torch.Generator().manual_seed(10 * seed + step)
            weight.grad = torch.randn(weight.shape, generator=chance)
            optimizer.step()

    with torch.compiler.set_stance("force_eager"):
        ours = nn.Parameter(torch.zeros(64, 128))
        optimizer = make([ours], lr=0.01)
        steps(ours, optimizer, 1)
        (other,) = twin([ours])
        assert reset_momentum_(optimizer) == 1
        steps(ours, optimizer, 2), steps(other, make([other], lr=0.01), 2)
        assert torch.equal(ours, other)
        assert prune_moments_(optimizer, [ours], 0.25) == 1
        assert reset_momentum_(optimizer, 0.5) == 1


class Devices(TorchDispatchMode):
    """Notes the devices of all tensors within its block but single numbers."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        self.found |= {t.device.type for t in tensors if t.ndim}
        return out


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_moments_in_8_bits_are_reset_on_their_own_device(strength):
    eight_bit = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    p = nn.Parameter(torch.empty(64, 64, device="meta"))
    optimizer = pytest.importorskip("torchao.optim").AdamW8bit([p])
    moments = {name: eight_bit.zeros((64, 64), True, 256, device="meta") for name in MOMENTS}
    optimizer.state[p] = {"step": torch.tensor(3.0), **moments}
    with Devices() as devices:
        reset_momentum_(optimizer, strength)
    assert devices.found == {"meta"}


def test_many_partial_resets_of_a_part_end_in_a_restart_not_in_an_error():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([p, q])
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    for _ in range(200):
        reset_momentum_(optimizer, 0.99, params=[q])
    assert reset_momentum_(optimizer, 0.99) == 2
    assert optimizer.state[q]["exp_avg"].isfinite().all()
    optimizer.step()
    assert q.isfinite().all()


def test_a_partial_reset_without_second_average_follows_the_first():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], betas=(0.9, 0.0))
    p.grad = torch.ones(3)
    optimizer.step()
    reset_momentum_(optimizer, 0.5)
    t = optimizer.state[p]["step"].item()
    assert 1 - 0.9**t == pytest.approx(0.5 * 0.1)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((3,), 0.05))


def test_a_second_moment_of_a_row_is_pruned_where_all_its_entries_are():
    W = nn.Parameter(torch.zeros(3, 4))
    optimizer = optim.NorMuon([{"params": [W], "use_muon": True}], lr=0.1)
    W.grad = torch.tensor([[9.0, 8, 7, 6], [1, 2, 5, 1], [0.1, 0.2, 0.3, 0.4]])
    optimizer.step()
    rows = optimizer.state[W]["exp_avg_sq"].clone()
    assert prune_moments_(optimizer, [W], keep=5 / 12) == 1
    assert optimizer.state[W]["exp_avg"].count_nonzero(dim=1).tolist() == [4, 1, 0]
    after = optimizer.state[W]["exp_avg_sq"]
    assert torch.equal(after[:2], rows[:2])
    assert not after[2].any()
