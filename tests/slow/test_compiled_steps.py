"""`torch.compile` of whole training steps with each optimizer, by its default backend.

And the chains of an optimizer, as `--compile` compiles them.
"""

import shutil

import pytest
import torch
from optimizer_rows import ROWS
from torch import nn

from lowrank_lab.device import cuda_path

FIRST_ROWS = {row.cls: row for row in reversed(ROWS)}.values()


def trained(row, compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    B, A, b = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4, 12)), nn.Parameter(
        torch.zeros(12)
    )  # fmt: skip
    group = {
        "params": [B, A],
        **row.keys,
        **({"rank": 4} if row.kind in ("ranked", "factors") else {}),
    }
    optimizer = row.cls([{"params": [b]}, group], lr=0.01)

    def step(x):
        loss = (x @ A.T @ B.T + b).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = torch.compile(step) if compiled else step
    losses = [step(torch.randn(8, 12)) for _ in range(12)]
    return torch.stack(losses), [p.detach() for p in (B, A, b)]


@pytest.mark.parametrize("row", FIRST_ROWS, ids=str)
def test_a_compiled_training_step_equals_the_plain_one(row):
    (losses, params), (plain_losses, plain) = trained(row, True), trained(row, False)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-4, atol=1e-5)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def with_chains(row, compiled):
    """The parameters after some steps in stacks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (24, 10), (10, 24), (16, 16), (24, 10)]
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    marks = {"rank": 4, "norm_dim": 1, "use_muon": True}
    mark = {} if row.kind == "whole" else {row.cls.marker: marks[row.cls.marker]}
    optimizer = row.cls([{"params": params, **mark, **row.keys, **row.soon}], lr=0.01)
    optimizer.compile_chains = compiled
    for _ in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        with cuda_path():
            optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("name", ["fira", "apollo", "spam", "stable-spam", "scale", "normuon"])
def test_compiled_chains_equal_plain_ones(name):
    row = next(row for row in ROWS if row.name == name)
    torch.compiler.reset()
    torch.testing.assert_close(
        with_chains(row, True), with_chains(row, False), rtol=1e-5, atol=1e-6
    )
