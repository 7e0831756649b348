"""What NorMuon alone has: rows of equal size, bfloat16, and groups with `use_muon` False."""

from functools import partial

import pytest
import pytorch_optimizer
import torch
from equality_errors import error, run
from optimizer_rows import NORMUON, normuon_in_package
from small_matrices import TALL, WIDE, noisy_gradients, relative
from torch import nn

from lowrank_lab import optim


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_in_bfloat16_it_is_the_package_up_to_the_rounding_of_its_iteration(shape):
    row = NORMUON.with_("bf16", {"ns_precision": "bf16"})
    ours, before, _ = run(row, shape, None)
    package = partial(normuon_in_package, cls=pytorch_optimizer.NorMuon)
    theirs, *_ = run(row, shape, None, package)
    assert error(ours.result(), theirs.result(), before) < 0.02


def test_the_first_step_has_rows_of_equal_size():
    W = nn.Parameter(torch.zeros(TALL))
    group = {"params": [W], "use_muon": True, "update_scale": "match_rms"}
    optimizer = optim.NorMuon([group], lr=0.01)
    (W.grad,) = noisy_gradients(TALL, 1)
    optimizer.step()
    assert W.detach().square().mean(1).sqrt() == pytest.approx(0.002, rel=1e-2)


def test_a_group_with_use_muon_false_is_adamw():
    ends = []
    for keys in ({}, {"use_muon": False}):
        W = nn.Parameter(torch.ones(TALL))
        optimizer = optim.NorMuon([{"params": [W], **keys}], lr=0.01, weight_decay=0.1)
        for G in noisy_gradients(TALL, 5):
            W.grad = G
            optimizer.step()
        assert optimizer.state[W]["exp_avg_sq"].shape == TALL
        ends.append(W.detach())
    reference = nn.Parameter(torch.ones(TALL))
    adamw = torch.optim.AdamW([reference], 0.01, (0.9, 0.95), 1e-10, 0.1)
    for G in noisy_gradients(TALL, 5):
        reference.grad = G
        adamw.step()
    assert torch.equal(*ends)
    assert relative(ends[0], reference.detach()) < 1e-6
