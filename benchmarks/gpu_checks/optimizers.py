"""Each optimizer in float64 on both devices: eight steps with a refresh, on equal gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.session import Item, Session, relative_error
from lowrank_lab.config import ResolvedConfig, RunConfig
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.build import build
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.optim.projection import REFRESHES
from lowrank_lab.techniques.states import unwrapped

STEPS, GAP, RANK = 8, 5, 4
EXACT, DECOMPOSED, HALF = 1e-9, 1e-4, 3e-2
# Decompositions of gradients are float32, and Muon's Newton-Schulz iteration is bfloat16.
DECOMPOSING = ("galore", "fira", "golore", "frugal", "ldadam")
LIMITS = dict.fromkeys(DECOMPOSING, DECOMPOSED) | {"muon": HALF}
COMPILED = ("fira", "stable-spam")  # norms per channel with a limit, and clipping
NOT_IN_FLOAT64 = ("adamw-8bit",)


def items(session: Session) -> Iterator[Item]:
    for name in METHODS:
        if name not in NOT_IN_FLOAT64:
            yield name, partial(same_on_both, session, name, name, {})
    for name in ("galore", "fira"):
        for refresh in REFRESHES:
            what = f"{name}, refresh {refresh}"
            yield what, partial(same_on_both, session, what, name, {"refresh": refresh})
    yield (
        "apollo, proj svd",
        partial(same_on_both, session, "apollo, proj svd", "apollo", {"proj": "svd"}, DECOMPOSED),
    )
    for name in COMPILED:
        what = f"{name}, compiled"
        yield what, partial(same_on_both, session, what, name, {}, compiled=True)


def configuration(method: str, options: dict[str, Any]) -> ResolvedConfig:
    """A tiny model with everything that is periodic due within the steps."""
    row = METHODS[method]
    periodic = {"update_proj_gap": GAP, "update_k": GAP, "warmup": 2, "grad_accu_steps": 2}
    given = {key: value for key, value in periodic.items() if key in row.options} | options
    rank = RANK if row.uses_rank and row.rank is None else None
    return resolve(
        RunConfig(model="tiny", method=method, rank=rank, method_options=given, steps=100)
    )


def same_on_both(
    session: Session,
    what: str,
    method: str,
    options: dict[str, Any],
    limit: float | None = None,
    compiled: bool = False,
) -> None:
    """The change of the weights after all steps, relative to that on the CPU; the worst weight.

    `compiled` holds on a card: a CPU would compile for a minute.
    """
    config = configuration(method, options)
    if limit is None:
        limit = LIMITS.get(method, EXACT)
    ours = after_steps(config, session.device, compiled and session.device.type == "cuda")
    theirs = after_steps(config, torch.device("cpu"))
    errors = {name: relative_error(ours[name], change) for name, change in theirs.items()}
    worst = max(errors, key=errors.__getitem__)
    session.results.fact(
        f"{what}: change of weights", errors[worst], "relative error", at_most(limit), worst=worst
    )


def after_steps(
    config: ResolvedConfig, device: torch.device, compiled: bool = False
) -> dict[str, Tensor]:
    """Weights after the steps minus those before, by name; float64 on the CPU."""
    model, optimizer = build(config)
    model.double().to(device)
    for inner in unwrapped(optimizer):
        inner.compile_chains = compiled  # type: ignore[attr-defined]
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with same_draws(), cuda_path():
        for _ in range(STEPS):
            give_gradients(model, generator)
            optimizer.step()
    return {
        name: (p.detach() - start[name]).cpu()
        for name, p in model.named_parameters()
        if name in start
    }


def give_gradients(model: nn.Module, generator: torch.Generator) -> None:
    """Random gradients, the same on every device; matrices have falling singular values."""
    for p in model.parameters():
        if not p.requires_grad:
            continue
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if grad.ndim == 2:
            grad *= 0.65 ** torch.arange(grad.shape[1], dtype=torch.float64)
        p.grad = grad.to(p.device)


@contextmanager
def same_draws() -> Iterator[None]:
    """In this block a CUDA generator draws the numbers of a CPU generator with its seed."""
    with (
        patch("torch.randn", _drawn_on_cpu(torch.randn)),
        patch("torch.rand", _drawn_on_cpu(torch.rand)),
        patch("torch.randperm", _drawn_on_cpu(torch.randperm)),
    ):
        yield


def _drawn_on_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(
        *args: Any, generator: torch.Generator | None = None, device: Any = None, **keys: Any
    ) -> Tensor:
        if generator is None or generator.device.type == "cpu":
            return draw(*args, generator=generator, device=device, **keys)
        same = torch.Generator().manual_seed(generator.initial_seed())
        return draw(*args, generator=same, **keys).to(generator.device)

    return drawn
