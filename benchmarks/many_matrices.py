"""Optimizers of thousands of small matrices: their time must grow no faster than the number."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row
from lowrank_lab import optim

FEW, MANY = 500, 4000
CASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "apollo": (optim.Apollo, {}),
    "golore": (optim.GoLore, {}),
    "galore, spread refreshes": (optim.GaLore, {"spread_refresh": True}),
}


def rows(quick: bool = False) -> list[Row]:
    """The first two steps of so many 16×16 matrices; `ratio` is to the time per matrix of FEW."""
    return [case(name, quick) for name in CASES]


def case(name: str, quick: bool) -> Row:
    few, many = (50, 200) if quick else (FEW, MANY)
    seconds(name, few)  # of the first call, what torch loads
    base = min(seconds(name, few) for _ in range(3)) / few
    ours = seconds(name, many)
    return Row(
        f"{many} matrices, first two steps: {name}", ours, None, base * many, "s",
        ours / (base * many), "≤ 2", f"the time per matrix of {few}",
    )  # fmt: skip


def seconds(name: str, count: int) -> float:
    """Time of the first two steps of that many matrices."""
    torch.manual_seed(0)
    method, keys = CASES[name]
    params = [nn.Parameter(torch.randn(16, 16)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(16, 16)
    optimizer = method([{"params": params, "rank": 4, **keys}], lr=1e-3)
    started = time.perf_counter()
    for _ in range(2):
        optimizer.step()
    return time.perf_counter() - started
