"""Compiled blocks compute what blocks do."""

import copy
import shutil

import pytest
import torch
from compiling import counting
from torch._dynamo.utils import counters

from lowrank_lab import factorize
from lowrank_lab.config import SIZES
from lowrank_lab.device import cuda_path
from lowrank_lab.models.llama import Llama

TINY = SIZES["tiny"]
STARTS = {"low-rank": "spectral", "lora": "kaiming", "cola": "normal", "sltrain": "kaiming"}


def some_tokens(seed):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (2, 40), generator=chance)


def in_factors(model, kind):
    if kind:
        factorize(model, kind, init=STARTS[kind], rank=4)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("", False), ("", True), *((kind, False) for kind in STARTS)],
)
def test_compiled_blocks_give_the_same_loss_and_gradients(half, kind, checkpointing):
    torch.manual_seed(0)
    ours = Llama(TINY, initializer_range=0.1)  # larger than usual, so that errors show
    compiled = Llama(TINY, activation_checkpointing=checkpointing)
    for model in (ours, compiled):
        in_factors(model, kind)
    compiled.load_state_dict(ours.state_dict())
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == ours.state_dict().keys()
    tokens, targets = some_tokens(0), some_tokens(1)
    found = []
    for model in (ours, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(tokens, targets)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (loss, expected), (mine, others) = found
    assert mine == pytest.approx(loss, rel=2**-8 if half else 1e-6)
    for name, gradient in expected.items():
        error = (others[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error <= (2**-5 if half else 2e-5), name


@pytest.mark.parametrize("kind", ["", *STARTS])
def test_mixed_precision_compiles_on_cudas_path_without_a_break(kind, monkeypatch):
    """Of each kind of layers: one graph for all blocks, forward and backward traced."""
    torch.manual_seed(0)
    ours = Llama(TINY, initializer_range=0.1)
    in_factors(ours, kind)
    found = []
    for compiles in (False, True):
        model = copy.deepcopy(ours)
        with counting(monkeypatch, "aot_eager"), cuda_path():
            if compiles:
                model.compile_blocks()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(some_tokens(0), some_tokens(1))
            loss.backward()
            assert not counters["graph_break"]
            assert counters["stats"]["unique_graphs"] == (3 if compiles else 0)
        found.append((loss.item(), gradients(model)))
    (loss, expected), (mine, others) = found
    assert mine == pytest.approx(loss, rel=2**-8)
    for name, gradient in expected.items():
        assert (others[name] - gradient).norm() <= 2**-5 * gradient.norm(), name
