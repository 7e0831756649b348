"""Factorised layers: SLTrain against its published formula, and the choice of association."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Row,
    check,
    gemm_rate,
    median,
    peak_bytes,
    ratio,
    relative_error,
    take_turns,
)
from lowrank_lab.layers import FactorizedLinear, LoRALinear, LowRankLinear, SLTrainLinear
from lowrank_lab.layers.association import Association, association_flops

Pass = Callable[[], tuple[Tensor, ...]]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rows(quick: bool = False) -> list[Row]:
    """Every comparison of this file; `quick`: tiny sizes and few rounds."""
    shapes = [(64, 160)] if quick else [(1024, 2736), (2736, 1024)]
    tokens, rank = (128, 16) if quick else (4096, 256)
    found = []
    for dtype in ROUNDING:
        for m, n in shapes:
            found += sltrain_rows(m, n, rank, tokens, dtype, quick)
    for kind in (LowRankLinear, LoRALinear):
        for dtype in ROUNDING if kind is LowRankLinear else [torch.float32]:
            found.append(association_row(kind, dtype, quick))
    return found


# SLTrain


class PublishedSLTrain(torch.autograd.Function):
    """W = scale · B A ⊕ S formed in both passes, and dYᵀX once for each of B, A and S."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, B, A, values, indices)
        ctx.scale = scale
        return x @ PublishedSLTrain.weight(B, A, values, indices, scale).T

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, values, indices = ctx.saved_tensors
        dx = dY @ PublishedSLTrain.weight(B, A, values, indices, ctx.scale)
        dB = ctx.scale * ((dY.T @ x) @ A.T)
        dA = ctx.scale * (B.T @ (dY.T @ x))
        dvalues = (dY.T @ x).reshape(-1).gather(0, indices)
        return dx, dB, dA, dvalues, None, None

    @staticmethod
    def weight(B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
        W = scale * (B @ A)
        W.view(-1).scatter_add_(0, indices, values)
        return W


def sltrain_rows(
    m: int, n: int, rank: int, tokens: int, dtype: torch.dtype, quick: bool
) -> list[Row]:
    """Forward and backward of one layer with 3 % sparse entries: seconds and peak bytes.

    The floor is three products of a t×n by an n×m matrix at the rate of a square product.
    """
    torch.manual_seed(0)
    layer = SLTrainLinear(nn.Linear(n, m, bias=False, dtype=dtype), rank, sparsity=0.03)
    nn.init.normal_(layer.B, std=rank**-0.5)
    x = torch.randn(tokens, n).to(dtype).requires_grad_()
    dY = torch.randn(tokens, m).to(dtype)
    indices = layer.indices.long()  # as published
    inputs = (x, layer.B, layer.A, layer.values)

    def published() -> Tensor:
        out: Tensor = PublishedSLTrain.apply(  # type: ignore[no-untyped-call]
            *inputs, indices, layer.scale
        )
        return out

    contestants = {
        "ours": forward_backward(lambda: layer(x), inputs, dY),
        "peer": forward_backward(published, inputs, dY),
    }
    name = f"SLTrain layer {m}×{n}, r {rank}, {tokens} tokens, {short(dtype)}"
    error = worst_error(contestants["ours"](), contestants["peer"]())
    check(name, error, ROUNDING[dtype])
    rounds = 2 if quick else 5
    seconds = take_turns(contestants, rounds)
    peaks = {who: peak_bytes(contestant) for who, contestant in contestants.items()}
    layer.keep_weight = True
    kept = take_turns(contestants, rounds // 2)
    kept_peak = peak_bytes(contestants["ours"]) / peaks["peer"]
    note = (
        f"keep_weight: {ratio(kept['peer'], kept['ours']):.2f} × at {kept_peak:.3f} of the memory"
    )
    floor = 3 * 2 * tokens * m * n / gemm_rate(dtype, quick)
    ours, peer = (1e3 * median(seconds[who]) for who in ("ours", "peer"))
    speed, memory = ratio(seconds["peer"], seconds["ours"]), peaks["ours"] / peaks["peer"]
    mib = {who: peak / 2**20 for who, peak in peaks.items()}
    peer_name = "published formula"
    return [
        Row(f"{name}: time", ours, peer, 1e3 * floor, "ms", speed, "≥ 1.5", peer_name, note),
        Row(f"{name}: peak", mib["ours"], mib["peer"], None, "MiB", memory, "≤ 1.0", peer_name),
    ]


# Association


def association_row(kind: type[LowRankLinear | LoRALinear], dtype: torch.dtype, quick: bool) -> Row:
    """Time of the chosen association over that of the best one: the maximum over a grid.

    ours and peer are milliseconds of the whole grid, with the chosen association and always through
    the factors; the floor is the best of every cell. Times are those of the fastest round: in a
    maximum over many cells, medians would show the machine's load.
    """
    shapes = [(32, 32)] if quick else [(512, 512), (512, 1376)]
    worst, where, total = 0.0, "", {"chosen": 0.0, "factors": 0.0, "best": 0.0}
    for m, n in shapes:
        for tokens in (64, 256) if quick else (256, 1024, 4096):
            for share in (0.25, 1.0) if quick else (0.125, 0.25, 0.5, 1.0):
                rank = int(share * min(m, n))
                chosen, seconds = time_associations(kind, m, n, rank, tokens, dtype, quick)
                fastest = {name: min(rounds) for name, rounds in seconds.items()}
                best = min(fastest, key=fastest.__getitem__)
                slower = fastest[chosen] / fastest[best]
                total["chosen"] += fastest[chosen]
                total["factors"] += fastest["factors"]
                total["best"] += fastest[best]
                if slower > worst:
                    worst = slower
                    where = f"{m}×{n}, r {rank}, {tokens} tokens: {chosen}, best {best}"
    ours, factors, floor = (1e3 * total[name] for name in ("chosen", "factors", "best"))
    name = f"{kind.__name__}, chosen association, {short(dtype)}: time of the best, worst case"
    return Row(name, ours, factors, floor, "ms", worst, "≤ 1.05", "always factors", where)


def time_associations(
    kind: type[LowRankLinear | LoRALinear],
    m: int,
    n: int,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    quick: bool,
) -> tuple[str, dict[str, list[float]]]:
    """The chosen association, and the seconds of forward and backward pass with each."""
    torch.manual_seed(0)
    layer = kind(nn.Linear(n, m, bias=False, dtype=dtype), rank)
    nn.init.normal_(layer.B, std=rank**-0.5)
    x = torch.randn(tokens, n).to(dtype).requires_grad_()
    dY = torch.randn(tokens, m).to(dtype)
    base = kind is LoRALinear
    chosen = layer.association(x, base=base)
    flops = association_flops(tokens, m, n, rank, base=base)
    inputs = (x, layer.B, layer.A)
    contestants: dict[str, Pass] = {
        name: forward_backward(forced(layer, x, name), inputs, dY)
        for name in flops
        if flops[name] <= 1.6 * min(flops.values())  # the others are far slower
        or name == "factors"
    }
    results = {name: contestant() for name, contestant in contestants.items()}
    for name, result in results.items():
        label = f"{kind.__name__} {m}×{n}, r {rank}, {tokens} tokens, {name}"
        check(label, worst_error(result, results["factors"]), ROUNDING[dtype])
    rounds = 1 if quick else 8 if flops[chosen] < 4e9 else 4
    return chosen, take_turns(contestants, rounds)


def forced(layer: FactorizedLinear, x: Tensor, association: Association) -> Callable[[], Tensor]:
    """The layer's forward pass with the given association."""

    def forward() -> Tensor:
        layer.association = lambda *_, **__: association  # type: ignore[method-assign]
        out: Tensor = layer(x)
        return out

    return forward


# Helpers


def forward_backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dY: Tensor) -> Pass:
    """Both passes: the output and the gradients of the inputs."""

    def both() -> tuple[Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, inputs, dY)

    return both


def worst_error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
