"""Optimizer steps against the published packages and fused AdamW: equal first, then timed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks.peers import published
from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.session import Item, Session, relative_error
from lowrank_lab import optim
from lowrank_lab.config import SIZES, TARGETS
from lowrank_lab.device import cuda_path
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama

RANKS = {"60m": 128, "350m": 256, "tiny": 4}
SHARED: dict[str, Any] = {"update_proj_gap": 200, "proj_type": "std"}
APOLLO = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
# ours, the peer's package and the keys of both; `method` is the name in METHODS
PAIRS: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "GaLore": (optim.GaLore, "galore_torch", SHARED | {"scale": 0.25}, "galore"),
    "Fira": (optim.Fira, "fira", SHARED | {"alpha": 1.0}, "fira"),
    "APOLLO": (optim.Apollo, "apollo_torch", SHARED | APOLLO, "apollo"),
}
# In float64, as Adam amplifies the rounding of products near 0; projections are float32 even so.
# In bf16, the rounding of weights is a tenth of so small a change, and another one in the two.
LIMITS = {torch.float64: 1e-6, torch.bfloat16: 0.2}
SHARE = 0.1  # of a training step
Shapes = tuple[list[torch.Size], list[torch.Size]]


def items(session: Session) -> Iterator[Item]:
    sizes = ("tiny",) if session.tiny else ("60m", "350m")
    for name in PAIRS:
        yield f"{name} equals its package", partial(pair, session, name, sizes[0], torch.float64)
    for size in sizes:
        yield f"{size}, AdamW", partial(fused_adamw, session, size)
        for name in PAIRS:
            yield f"{size}, {name}", partial(timed, session, name, size)


def shapes_of(size: str) -> Shapes:
    """Shapes of the target matrices, and of all other weights."""
    with torch.device("meta"):
        model = Llama(SIZES[size])
    targets, rest = partition(model, TARGETS)
    return [p.shape for p in targets], [p.shape for p in rest]


class Contestant:
    """Weights of a model's shapes on the device, and an optimizer of them."""

    def __init__(self, device: torch.device, shapes: Shapes, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def weight(shape: torch.Size) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator, device=device)
            return nn.Parameter(drawn.mul_(0.02).to(dtype))

        self.targets, self.rest = ([weight(shape) for shape in part] for part in shapes)
        self.params = [*self.targets, *self.rest]
        self.start = [p.detach().clone() for p in self.params]
        self.optimizer: torch.optim.Optimizer

    def with_(self, cls: Any, rank: int, keys: dict[str, Any]) -> Contestant:
        ranked = {"params": self.targets, "rank": rank, **keys}
        with warnings.catch_warnings(action="ignore"):
            self.optimizer = cls([ranked, {"params": self.rest}], lr=1e-3)
        return self

    def step(self) -> None:
        self.optimizer.step()

    def changes(self) -> list[Tensor]:
        return [p.detach() - s for p, s in zip(self.params, self.start, strict=True)]


def give_gradients(contestants: list[Contestant], seed: int) -> None:
    """New random gradients, the same tensors for all."""
    first = contestants[0].params
    generator = torch.Generator(first[0].device).manual_seed(seed)
    for same in zip(*(c.params for c in contestants), strict=True):
        p = same[0]
        grad = torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype)
        for q in same:
            q.grad = grad


@contextmanager
def quick_svd() -> Iterator[None]:
    """In this block fixed orthonormal bases stand in for SVDs, in ours and in the packages.

    Both take any orthonormal columns. Hundreds of SVDs would take minutes; `refreshes` times them.
    """

    @cache
    def basis(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(side)
        return torch.linalg.qr(
            torch.randn(side, side, generator=generator, device=device, dtype=dtype)
        )[0]

    def decomposed(A: Tensor, full_matrices: bool = True, **_: Any) -> tuple[Tensor, ...]:
        *stack, m, n = A.shape
        U, V = (basis(side, A.dtype, A.device)[:, : min(m, n)] for side in (m, n))
        values = torch.ones(*stack, min(m, n), dtype=A.dtype, device=A.device)
        return U.expand(*stack, -1, -1), values, V.mT.expand(*stack, -1, -1)

    with patch("torch.linalg.svd", decomposed):
        yield


def pair(
    session: Session, name: str, size: str, dtype: torch.dtype
) -> tuple[Contestant, Contestant]:
    """Ours and the package's after two steps on equal gradients; how far they differ is a check."""
    ours, package, keys, _ = PAIRS[name]
    shapes = shapes_of(size)
    own = {"refresh": "svd"} if "refresh" in ours.group_defaults else {}  # the packages' only way
    mine, other = (
        Contestant(session.device, shapes, dtype).with_(cls, RANKS[size], given)
        for cls, given in ((ours, keys | own), (published(package), keys))
    )
    with quick_svd(), cuda_path():
        for seed in (1, 2):
            give_gradients([mine, other], seed)
            mine.step()
            other.step()
    error = max(map(relative_error, mine.changes(), other.changes()))
    bits = str(dtype).removeprefix("torch.")
    what = f"{size}, {name} and its package, {bits}: changes of weights"
    session.results.fact(what, error, "relative error", at_most(LIMITS[dtype]))
    return mine, other


def fused_adamw(session: Session, size: str) -> None:
    """The step that all methods are compared with, full rank in bf16."""
    one = Contestant(session.device, shapes_of(size), torch.bfloat16)
    one.optimizer = torch.optim.AdamW(one.params, lr=1e-3, fused=True)
    give_gradients([one], 1)
    session.known[f"adamw/{size}"] = taken = session.seconds(one.step)
    session.results.fact(f"{size}, fused AdamW: step", 1e3 * taken, "ms")


def timed(session: Session, name: str, size: str) -> None:
    """A step in bf16 with nothing due: ours, the package's, and its share of a training step."""
    ours, theirs = pair(session, name, size, torch.bfloat16)
    with cuda_path():
        mine, other = session.seconds(ours.step), session.seconds(theirs.step)
    method, report = PAIRS[name][3], session.results.fact
    report(f"{size}, {name}: step", 1e3 * mine, "ms", package_ms=1e3 * other,
           adamw_ms=1e3 * session.known.get(f"adamw/{size}", float("nan")))  # fmt: skip
    report(f"{size}, {name}: time of the package over ours", other / mine, "×")
    whole = session.known.get(f"step/{size}/{method}")
    if whole is None:  # not measured by `speed`, which takes one method at this size
        whole = session.known.get(f"step/{size}/full-rank")
    if whole is not None:
        limit = None if session.tiny else at_most(SHARE)
        report(f"{size}, {name}: share of a training step", mine / whole, "", limit)
    del ours, theirs
    gc.collect()
