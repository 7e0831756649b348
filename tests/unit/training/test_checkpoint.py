"""A checkpoint holds a training state bit for bit, and training goes on as if never interrupted."""

import json
import math

import pytest
import torch
from short import QUICK, reset_of, short_options

from lowrank_lab.config import RunConfig
from lowrank_lab.layers import LoRALinear
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.training.checkpoint import all_checkpoints, load, save
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.step import update_

STEPS = 12


def config_of(method, **values):
    """A tiny run with a refresh, a refactorization and a reset in each half of its 12 steps."""
    row = METHODS[method]
    options = short_options(method, 4)
    techniques = {"reset_every": 5, "recovery_steps": 2, "reset_strength": 0.7}
    techniques |= {"refactor_every": 4} if row.has_products else {}
    techniques |= reset_of(method)
    given = {"model": "tiny", "steps": STEPS, "method": method, "method_options": options}
    return resolve(RunConfig(**{**given, **techniques, **values}))


def train(model, optimizer, config, first, last):
    """Updates first … last − 1 on tokens that are a pure function of the step; their losses."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(100, (2, 17), generator=generator)
        loss, _ = gradients(model, [(tokens[:, :-1], tokens[:, 1:])], config)
        update_(model, optimizer, config, step)
        losses.append(loss.item())
    return losses


def state_of(model, optimizer):
    """Weights, then optimizer states by parameter name, tensors and Python scalars alike."""
    states = {n: dict(optimizer.state.get(p, {})) for n, p in model.named_parameters()}
    return {**model.state_dict(), **{(n, k): v for n, s in states.items() for k, v in s.items()}}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert type(theirs[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert theirs[key].dtype == value.dtype, key
            assert torch.equal(theirs[key], value), key
        else:
            assert theirs[key] == value, key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", QUICK)
def test_weights_and_states_come_back_bit_for_bit(method, precision, tmp_path):
    config = config_of(method, precision=precision)
    ours = build(config)
    train(*ours, config, 0, 6)
    save(tmp_path, 6, *ours)
    theirs = build(config.override(seed=1))
    assert load(tmp_path, *theirs) == (6, {})
    assert_equal(state_of(*ours), state_of(*theirs))


@pytest.mark.parametrize("method", ["galore", "fira"])
def test_python_scalars_of_a_state_come_back_as_such(method, tmp_path):
    config = config_of(method)
    ours, theirs = build(config), build(config)
    train(*ours, config, 0, 6)
    save(tmp_path, 6, *ours)
    load(tmp_path, *theirs)
    state = theirs[1].state[theirs[0].model.layers[1].mlp.down_proj.weight]
    assert (state["step"], type(state["step"])) == (6, int)
    assert (0 < state["exp_avg_weight"] < 1, type(state["exp_avg_weight"])) == (True, float)
    assert torch.is_tensor(state["exp_avg"])


@pytest.mark.parametrize("at", [4, 5, 7])  # after a refresh and refactorization, a reset, neither
@pytest.mark.parametrize("method", QUICK)
def test_interrupted_training_equals_uninterrupted_training(method, at, tmp_path):
    config = config_of(method)
    whole = build(config)
    losses = train(*whole, config, 0, STEPS)
    first, second = build(config), build(config)
    with torch.no_grad():  # in place: views of one vector lie where a GEMM rounds otherwise
        for p in second[0].parameters():
            p.fill_(1)
    before = train(*first, config, 0, at)
    save(tmp_path, at, *first)
    del first
    step, _ = load(tmp_path, *second)
    assert before + train(*second, config, step, STEPS) == losses
    assert_equal(state_of(*whole), state_of(*second))


def test_a_checkpoint_before_the_first_step_is_the_start(tmp_path):
    config = config_of("galore")
    ours, theirs = build(config), build(config.override(seed=1))
    save(tmp_path, 0, *ours)
    assert load(tmp_path, *theirs) == (0, {})
    assert_equal(state_of(*ours), state_of(*theirs))


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    config = config_of("full-rank")
    ours, theirs = build(config), build(config)
    assert load(tmp_path / "missing", *theirs) == (0, {})
    assert_equal(state_of(*ours), state_of(*theirs))


@pytest.mark.parametrize(
    "extra", [{}, {"seconds": 0.1 + 0.2}, {"a": [1, None, "ü\n"], "b": {"c": -1e-300}, "d": True}]
)
def test_what_was_saved_beside_the_state_comes_back(extra, tmp_path):
    pair = build(config_of("full-rank"))
    save(tmp_path, 3, *pair, **extra)
    assert load(tmp_path, *pair) == (3, extra)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    pair = build(config_of("full-rank"))
    for step in (1, 9, 10, 100, 2000):
        assert save(tmp_path, step, *pair) in all_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000100", "step-00002000"]
    assert load(tmp_path, *pair)[0] == 2000


def test_saving_a_step_again_replaces_it(tmp_path):
    config = config_of("full-rank")
    pair, other = build(config), build(config)
    save(tmp_path, 5, *pair, attempt=1)
    train(*pair, config, 0, 1)
    save(tmp_path, 5, *pair, attempt=2)
    assert load(tmp_path, *other) == (5, {"attempt": 2})
    assert_equal(state_of(*pair), state_of(*other))


def test_a_partial_checkpoint_is_ignored(tmp_path):
    pair = build(config_of("full-rank"))
    whole = save(tmp_path, 5, *pair)
    partial = tmp_path / ".partial-step-00000006-123"
    partial.mkdir()
    (partial / "state.json").write_text("{")
    assert all_checkpoints(tmp_path) == [whole]
    assert load(tmp_path, *pair)[0] == 5


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    pair = build(config_of("full-rank"))
    whole = save(tmp_path, 5, *pair)
    before = {path: path.read_bytes() for path in whole.iterdir()}

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fails)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 6, *pair)
    monkeypatch.undo()
    assert all_checkpoints(tmp_path) == [whole]
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_values_that_are_not_finite_are_kept_as_they_are(tmp_path):
    config = config_of("galore")
    pair, other = build(config), build(config)
    train(*pair, config, 0, 1)
    weight = pair[0].lm_head.weight
    pair[1].state[weight]["exp_avg_weight"] = math.inf
    with torch.no_grad():
        weight[0, 0] = -math.inf
    save(tmp_path, 1, *pair)
    load(tmp_path, *other)
    assert_equal(state_of(*pair), state_of(*other))


def test_an_old_checkpoint_of_a_warm_start_loads_with_the_new_name_of_its_dense_weight(tmp_path):
    class Old(torch.nn.Module):  # a LoRA layer as it was
        def __init__(self):
            super().__init__()
            for name, shape in (("weight", (6, 5)), ("B", (6, 2)), ("A", (2, 5))):
                self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    old = torch.nn.Sequential(Old())
    optimizer = torch.optim.AdamW(old.parameters())
    for p in old.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    save(tmp_path, 3, old, optimizer)
    new = torch.nn.Sequential(LoRALinear(torch.nn.Linear(5, 6, bias=False), 2))
    loaded = torch.optim.AdamW(new.parameters())
    assert load(tmp_path, new, loaded)[0] == 3
    for ours, theirs in (("base_weight", "weight"), ("B", "B"), ("A", "A")):
        p, q = getattr(new[0], ours), getattr(old[0], theirs)
        assert torch.equal(p, q)
        assert torch.equal(loaded.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
