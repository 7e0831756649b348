"""`torch.compile` of whole training steps with each optimizer, by its default backend."""

import pytest
import torch
from optimizer_rows import ROWS
from torch import nn

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
