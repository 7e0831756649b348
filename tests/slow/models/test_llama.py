"""Compiled blocks compute what blocks do."""

import shutil

import pytest
import torch

from lowrank_lab.config import SIZES
from lowrank_lab.models.llama import Llama

TINY = SIZES["tiny"]


def some_tokens(seed):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (2, 40), generator=chance)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_loss_and_gradients(half, checkpointing):
    torch.manual_seed(0)
    ours = Llama(TINY, initializer_range=0.1)  # larger than usual, so that errors show
    compiled = Llama(TINY, activation_checkpointing=checkpointing)
    compiled.load_state_dict(ours.state_dict())
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == ours.state_dict().keys()
    tokens, targets = some_tokens(0), some_tokens(1)
    found = []
    for model in (ours, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(tokens, targets)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, expected), (mine, others) = found
    assert mine == pytest.approx(loss, rel=2**-8 if half else 1e-6)
    for name, gradient in expected.items():
        error = (others[name] - gradient).norm() / gradient.norm()
        assert error <= (2**-5 if half else 2e-5), name
