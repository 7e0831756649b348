"""Whole optimizer steps at LLaMA-60m, embeddings included, against the published packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    PRODUCTS,
    Row,
    check,
    in_fresh_process,
    median,
    ratio,
    relative_error,
    take_turns,
    where_time_goes,
)
from lowrank_lab import optim
from lowrank_lab.config import SIZES, TARGETS
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama

GALORE = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
FIRA = {"update_proj_gap": 200, "alpha": 1.0, "proj_type": "std"}
APOLLO = {
    "update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std",
    "scale_type": "channel",
}  # fmt: skip


class Contestant:
    """Weights of a model's shapes with random gradients, and an optimizer for them."""

    def __init__(
        self, build: Callable[[list[Tensor], list[Tensor]], torch.optim.Optimizer],
        size: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Llama(SIZES[size])
        shapes = [[p.shape for p in part] for part in partition(model, TARGETS)]
        targets, rest = (
            [nn.Parameter((0.02 * torch.randn(s)).to(dtype)) for s in part] for part in shapes
        )
        self.params = targets + rest
        self.targets = targets
        self.start = [p.detach().clone() for p in self.params]
        self.optimizer = build(targets, rest)

    def step(self) -> None:
        self.optimizer.step()


def fresh_gradients(contestants: tuple[Contestant, Contestant]) -> None:
    """New random gradients, the same tensors for both."""
    for p, q in zip(*(c.params for c in contestants), strict=True):
        p.grad = torch.empty_like(p) if p.grad is None else p.grad
        q.grad = p.grad.normal_()


def packages() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Ours, the keys of its ranked group, and its peers."""
    from apollo_torch import APOLLOAdamW
    from fira import FiraAdamW
    from galore_torch import GaLoreAdamW

    def package(cls: Any, keys: dict[str, Any], rank: int, **options: Any) -> Any:
        def build(targets: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
            ranked = {"params": targets, "rank": rank, **keys}
            made: torch.optim.Optimizer = cls([ranked, {"params": rest}], lr=1e-3, **options)
            return made

        return build

    quiet = {"no_deprecation_warning": True}
    galore = {
        "galore-torch": lambda rank: package(GaLoreAdamW, GALORE, rank, **quiet),
        "pytorch_optimizer": _pytorch_optimizer,
    }
    fira = {"fira": lambda rank: package(FiraAdamW, FIRA, rank, **quiet)}
    apollo = {"apollo-torch": lambda rank: package(APOLLOAdamW, APOLLO, rank)}
    return {
        "GaLore": (optim.GaLore, GALORE, galore),
        "Fira": (optim.Fira, FIRA, fira),
        "APOLLO": (optim.Apollo, APOLLO, apollo),
    }


def _pytorch_optimizer(rank: int) -> Any:
    from pytorch_optimizer import GaLore

    def build(targets: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
        keys = {name.replace("proj_type", "projection_type"): v for name, v in GALORE.items()}
        ranked = {"params": targets, "rank": rank, **keys}
        made: torch.optim.Optimizer = GaLore([ranked, {"params": rest}], lr=1e-3)
        return made

    return build


PARTS = {"products": PRODUCTS, "fused AdamW": ("aten::_fused_adam",)}
TARGET = {"GaLore": "2.2", "Fira": "2.3", "APOLLO": "2.3"}


def rows(quick: bool = False) -> list[Row]:
    size, rank, rounds = ("tiny", 4, 1) if quick else ("60m", 128, 15)
    pairs = [(name, who) for name, (_, _, peers) in packages().items() for who in peers]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, who in pairs:
            case = (name, who, size, rank, dtype, rounds)
            found += compare(*case) if quick else in_fresh_process(compare, *case)
    return found


def compare(
    name: str, peer_name: str, size: str, rank: int, dtype: torch.dtype, rounds: int
) -> list[Row]:
    """A step of ours against a peer's; for GaLore also its projected part."""
    warnings.filterwarnings("ignore")
    ours, keys, peers = packages()[name]
    peer = peers[peer_name](rank)

    def mine(targets: list[Tensor], rest: list[Tensor]) -> torch.optim.Optimizer:
        ranked = {"params": targets, "rank": rank, **keys}
        made: torch.optim.Optimizer = ours([ranked, {"params": rest}], lr=1e-3)
        return made

    a, b = Contestant(mine, size, dtype), Contestant(peer, size, dtype)
    floor, projected = floor_of(a, rank, name), projected_part(a)
    # The same float32 products for both: near 0, Adam amplifies differences in rounding.
    with torch.backends.mkldnn.flags(enabled=dtype != torch.float32):
        for _ in range(2):
            fresh_gradients((a, b))
            a.step()
            b.step()
    limit = 1e-5 if dtype == torch.float32 else 0.1  # bf16 weights round away most of an update
    error = max(
        relative_error(p.detach() - s, q.detach() - t)
        for p, s, q, t in zip(a.params, a.start, b.params, b.start, strict=True)
    )
    check(f"{name} {dtype}", error, limit)
    seconds = take_turns(
        {"ours": a.step, "peer": b.step, "floor": floor},
        rounds,
        before=lambda: fresh_gradients((a, b)),
    )
    bits = "fp32" if dtype == torch.float32 else "bf16"
    target = "2.2" if name == "Fira" and bits == "bf16" else TARGET[name]
    ms = {k: 1e3 * median(v) for k, v in seconds.items()}
    row = Row(
        f"{name} step, {size}, rank {rank}, {bits}", ms["ours"], ms["peer"], ms["floor"], "ms",
        ratio(seconds["peer"], seconds["ours"]), f"≥ {target}", peer_name,
        "floor: GEMMs, AdamW of the rest, and where G itself is added one pass of that; "
        f"our time: {where_time_goes(a.step, PARTS)}",
    )  # fmt: skip
    if name != "GaLore" or peer_name != "galore-torch":
        return [row]
    gemms = gemms_of(a, rank)
    part = take_turns(
        {"ours": projected, "floor": gemms}, rounds, before=lambda: fresh_gradients((a, b))
    )
    share = Row(
        f"GaLore's projected part, {size}, rank {rank}, {bits}", 1e3 * median(part["ours"]), None,
        1e3 * median(part["floor"]), "ms", ratio(part["ours"], part["floor"]), "≤ 1.10",
        "two GEMMs", f"ratio: ours over the floor; our time: {where_time_goes(projected, PARTS)}",
    )  # fmt: skip
    return [row, share]


def projected_part(contestant: Contestant) -> Callable[[], None]:
    """The step of the ranked group alone."""
    group = contestant.optimizer.param_groups[0]

    def run() -> None:
        with torch.no_grad():
            contestant.optimizer.step_group_(group["params"], group)  # type: ignore[operator]

    return run


def gemms_of(contestant: Contestant, rank: int, products: int = 2) -> Callable[[], None]:
    """Projection and back-projection, one matrix after the other, as GaLore requires."""
    work = []
    for p in contestant.targets:
        side, other = min(p.shape), max(p.shape)
        P = torch.linalg.qr(torch.randn(side, rank))[0].to(p.dtype)
        shape = (other, rank) if p.shape[0] >= p.shape[1] else (rank, other)
        work.append((p, P, torch.empty(shape, dtype=p.dtype)))

    def run() -> None:
        with torch.no_grad():
            for p, P, R in work:
                tall = p.shape[0] >= p.shape[1]
                torch.mm(p.grad, P, out=R) if tall else torch.mm(P.T, p.grad, out=R)
                if products == 2:
                    p.addmm_(R, P.T, alpha=-1e-9) if tall else p.addmm_(P, R, alpha=-1e-9)

    return run


def floor_of(contestant: Contestant, rank: int, name: str) -> Callable[[], None]:
    """The minimum work of a method: its GEMMs, and torch's fused AdamW for the other parameters.

    Fira and APOLLO also add G, scaled per channel: one pass over W and G.
    """
    gemms = gemms_of(contestant, rank, products=1 if name == "APOLLO" else 2)
    scales = [torch.ones(1, p.shape[1]).to(p) for p in contestant.targets]
    rest = [nn.Parameter(p.detach().clone()) for p in contestant.params[len(contestant.targets) :]]
    adamw = torch.optim.AdamW(rest, lr=1e-9, fused=True)

    def run() -> None:
        for p, q in zip(rest, contestant.params[len(contestant.targets) :], strict=True):
            p.grad = q.grad
        gemms()
        if name != "GaLore":
            with torch.no_grad():
                for p, scale in zip(contestant.targets, scales, strict=True):
                    assert p.grad is not None
                    p.addcmul_(p.grad, scale, value=-1e-9)
        adamw.step()

    return run
