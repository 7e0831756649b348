"""adamw-8bit (torchao): trains, resumes bit for bit, resets, and holds the bytes it should."""

import shutil

import pytest
import torch

from lowrank_lab.config import RunConfig
from lowrank_lab.memory.breakdown import persistent, tensor_bytes
from lowrank_lab.memory.formulas import optimizer_state_bytes
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.techniques import reset_momentum_
from lowrank_lab.training.checkpoint import load, save
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.step import update_

pytest.importorskip("torchao")
COMPILERS = ("g++", "c++", "clang++")
pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore"),
]


def train(model, optimizer, config, first, last):
    losses = []
    for step in range(first, last):
        tokens = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(step))
        loss, _ = gradients(model, [(tokens[:, :-1], tokens[:, 1:])], config)
        update_(model, optimizer, config, step)
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def config():
    return resolve(RunConfig(model="tiny", method="adamw-8bit", steps=12, lr=1e-2))


def test_it_trains_and_goes_on_bit_for_bit_from_a_checkpoint(config, tmp_path):
    whole, first, second = build(config), build(config), build(config)
    losses = train(*whole, config, 0, 12)
    assert losses[-1] < losses[0] - 0.5
    before = train(*first, config, 0, 5)
    save(tmp_path, 5, *first)
    assert load(tmp_path, *second)[0] == 5
    assert before + train(*second, config, 5, 12) == losses


def test_a_large_weight_holds_two_bytes_an_element_and_a_scale_a_block(config):
    model, optimizer = build(config)
    train(model, optimizer, config, 0, 1)
    n, state = model.lm_head.weight.numel(), optimizer.state[model.lm_head.weight]
    moments, tables = 2 * (n + 4 * n // 256), 2 * 256 * 4
    assert tensor_bytes(state.values()) == moments + tables + 4  # and the step count


def test_a_full_reset_clears_the_quantized_moments(config):
    model, optimizer = build(config)
    train(model, optimizer, config, 0, 2)
    reset_momentum_(optimizer, 1.0)
    for state in optimizer.state.values():
        assert state["step"] == 0
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            plain = moment.dequantize() if hasattr(moment, "dequantize") else moment
            assert plain.abs().max() == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_are_the_bytes_of_the_formula(config, precision):
    config = config.replace(precision=precision)
    model, optimizer = build(config)
    train(model, optimizer, config, 0, 1)
    assert persistent(model, optimizer).optimizer_states == optimizer_state_bytes(config)
