"""Refreshes of projections by each way that GaLore has, at the shapes of 60m and 350m."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks.results import at_least
from benchmarks.gpu_checks.session import Item, Session
from lowrank_lab.config import SIZES
from lowrank_lab.device import cuda_path
from lowrank_lab.optim import GaLore
from lowrank_lab.optim.projection import REFRESHES

GAP = 200  # steps between two refreshes in training
MATRICES = 4  # of a shape at once
LEAST_ENERGY = 0.98  # captured, of what the exact subspace captures
# size of model, shape, rank, and how many such matrices a layer has
CASES = (
    ("60m", (512, 512), 128, 4), ("60m", (1376, 512), 128, 3),
    ("350m", (1024, 1024), 256, 4), ("350m", (2736, 1024), 256, 3),
)  # fmt: skip
TINY = (("tiny", (32, 32), 4, 4), ("tiny", (88, 32), 4, 3))
Case = tuple[str, tuple[int, int], int, int]


def items(session: Session) -> Iterator[Item]:
    named = [way for way in REFRESHES if way != "auto"]  # which is one of the others
    ways = sorted(named, key="svd".__eq__)  # full SVDs last: they take longest
    for way in ways:
        for case in TINY if session.tiny else CASES:
            yield f"{way}, {case[1][0]}×{case[1][1]}", partial(refresh, session, way, case)


def gradients(session: Session, shape: tuple[int, int], seed: int) -> list[Tensor]:
    """Matrices with singular values that fall as those of early gradients, and a little noise."""
    generator = torch.Generator(session.device).manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=session.device)

    side = min(shape)
    fall = torch.arange(1, side + 1, device=session.device).float() ** -0.75
    return [
        (drawn(shape[0], side) * fall) @ drawn(side, shape[1]) / side + 1e-3 * drawn(*shape)
        for _ in range(MATRICES)
    ]


def refresh(session: Session, way: str, case: Case) -> None:
    """Milliseconds per matrix, as the difference of steps with and without a refresh."""
    size, shape, rank, per_layer = case
    grads = gradients(session, shape, 0)
    params = [nn.Parameter(torch.zeros(shape, device=session.device)) for _ in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad

    def optimizer(gap: int) -> GaLore:
        keys = {"rank": rank, "update_proj_gap": gap, "refresh": way}
        return GaLore([{"params": params, **keys}], lr=1e-3)

    with cuda_path():
        often, never = optimizer(1), optimizer(10**9)
        rounds = 1 if way == "svd" else 3
        with_it = session.seconds(often.step, rounds=rounds, warm_up=1)
        without = session.seconds(never.step, rounds=3, warm_up=1)
    each = max(with_it - without, 0.0) / len(params)
    what = f"{way}, {shape[0]}×{shape[1]}, rank {rank}"
    session.results.fact(f"{what}: refresh of a matrix", 1e3 * each, "ms")
    whole = session.known.get(f"step/{size}/galore")
    if whole is not None:
        share = each * per_layer * SIZES[size].num_layers / (GAP * whole)
        session.results.fact(f"{what}: share of training", share, f"of {GAP} steps")
    if way != "svd":
        states = [often.state[p] for p in params]
        least = min(energy(grad, state, rank) for grad, state in zip(grads, states, strict=True))
        session.results.fact(f"{what}: energy of the exact subspace", least, "share",
                             at_least(LEAST_ENERGY))  # fmt: skip


def energy(G: Tensor, state: dict[str, Tensor], rank: int) -> float:
    """What the stored projection captures of ‖G‖², over what the exact one captures."""
    P = state["projection_left"] if "projection_left" in state else state["projection_right"]
    wide = (G.mT if "projection_left" in state else G).double()  # P is of its right side
    values = torch.linalg.eigvalsh(wide.mT @ wide)
    return float((wide @ P.double()).square().sum() / values[-rank:].sum())
