"""Refreshes of projections, and refactorization, against the full SVDs of the published code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, check, median, ratio, relative_error, take_turns
from lowrank_lab.config import SIZES, TARGETS, RunConfig
from lowrank_lab.cpu.products import fast_products
from lowrank_lab.layers import LowRankLinear, truncated_svd
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim.projection import new_projections
from lowrank_lab.optim.subspaces import leading_subspaces, randomized_subspaces, sides
from lowrank_lab.techniques import refactorize_
from lowrank_lab.training.preflight import check as checked
from lowrank_lab.training.trainer import Trainer


def rows(quick: bool = False) -> list[Row]:
    sizes = [(32, 88)] if quick else [(1024, 1024), (1024, 2736), (2048, 2048), (2048, 5461)]
    starts = [spectral_start(*size) for size in sizes]
    return [refresh(quick), *energies(quick), refactorization(quick), *starts]


def gradients(model: Llama, seed: int, tokens: int = 1024) -> list[Tensor]:
    """Gradients of the target weights on text-like tokens (Zipf), half of each batch repeated."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.size.vocab_size
    weights = 1 / torch.arange(1, vocabulary + 1)
    half = torch.multinomial(weights, tokens // 2, replacement=True, generator=generator)
    text = torch.cat([half, half]).view(-1, 128)
    model.zero_grad(set_to_none=True)
    model.loss(text[:, :-1], text[:, 1:]).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in partition(model, TARGETS)[0] if p.grad is not None]


def refresh(quick: bool) -> Row:
    """One warm refresh of all layers of 130m at rank 256, against full SVDs."""
    size, rank, rounds = ("tiny", 4, 1) if quick else ("130m", 256, 3)
    torch.manual_seed(0)
    model = Llama(SIZES[size])
    first = [g.clone() for g in gradients(model, 0)]
    # A warm refresh starts from the projections of another batch.
    old = [randomized_subspaces(g, rank, sides("std", g.shape)) for g in first]
    now = [g.clone() for g in gradients(model, 1)]

    def warm() -> list[tuple[Tensor | None, Tensor | None]]:
        with fast_products():  # as in an optimizer's step
            return [
                randomized_subspaces(g, rank, sides("std", g.shape), seed=1, old=pair)
                for g, pair in zip(now, old, strict=True)
            ]

    def exact() -> list[tuple[Tensor | None, Tensor | None]]:
        return [leading_subspaces(g, rank, sides("std", g.shape)) for g in now]

    least = min(
        captured(g, a) / captured(g, b) for g, a, b in zip(now, warm(), exact(), strict=True)
    )
    seconds = take_turns({"ours": warm, "peer": exact}, rounds)
    return Row(
        f"refresh of all layers, {size}, rank {rank}", 1e3 * median(seconds["ours"]),
        1e3 * median(seconds["peer"]), None, "ms", ratio(seconds["peer"], seconds["ours"]), "≥ 5",
        "full SVD", f"least energy captured, against exact: {least:.4f}",
    )  # fmt: skip


def captured(G: Tensor, pair: tuple[Tensor | None, Tensor | None]) -> float:
    """‖Lᵀ G‖² or ‖G R‖²."""
    left, right = pair
    kept = left.T @ G if left is not None else G @ right
    return float(kept.square().sum())


# Singular values s_i of hard matrices, for i = 1 … k and a rank r; `flat` is a Gaussian matrix.
SPECTRA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slow": lambda i, r: i**-0.25,
    "power": lambda i, r: 1 / i,
    "fast": lambda i, r: 0.8**i,
    "rank 3": lambda i, r: 1.0 * (i <= 3),
    "step": lambda i, r: torch.where(i <= r, 1.0, 0.95),
    "clusters": lambda i, r: torch.where(i <= r / 2, 1.0, torch.where(i <= 2 * r, 0.95, 0.9)),
    "flat": lambda i, r: torch.zeros_like(i),
    "flat with spikes": lambda i, r: 30.0 * (i <= 3),
    "flat with high spikes": lambda i, r: 1000.0 * (i <= 3),
}


def with_spectrum(name: str, m: int, n: int, rank: int, seed: int) -> Tensor:
    """An m×n matrix with random singular vectors and the singular values of SPECTRA."""
    chance = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(side, k, generator=chance))[0] for side in (m, n))
    G = (U * SPECTRA[name](torch.arange(1.0, k + 1), rank)) @ V.T
    noise = torch.randn(m, n, generator=chance) / n**0.5
    return G + noise if name.startswith("flat") else G


def energies(quick: bool) -> list[Row]:
    """Lowest captured energy of inexact refreshes: gradients early and late, and hard spectra."""
    model = "tiny" if quick else "micro"
    sizes = [(24, 40, 6)] if quick else [(64, 176, 16), (512, 512, 32), (512, 1376, 128)]
    pairs = recorded_gradients(model, quick)
    for name in SPECTRA:
        made = [[with_spectrum(name, *size, seed=i) for size in sizes] for i in range(2)]
        pairs[f"matrices, {name}"] = list(zip(*made, [r for _, _, r in sizes], strict=True))
    found = [
        energy(refresh, what, cases)
        for refresh in ("subspace", "randomized")
        for what, cases in pairs.items()
    ]
    return found


def energy(refresh: str, what: str, cases: list[tuple[Tensor, Tensor, int]]) -> Row:
    """Captured energy of a warm refresh against the exact one, the worst of (before, now, rank)."""
    shares = []
    for then, now, rank in cases:
        which = sides("std", now.shape)
        old = leading_subspaces(then, rank, which)
        group = {"rank": rank, "proj_type": "std", "refresh": refresh}
        warm = new_projections(now, old, 1, group)
        shares.append(captured(now, warm) / captured(now, leading_subspaces(now, rank, which)))
    hard = what.startswith("matrices")
    target = "" if hard and refresh == "randomized" else "≥ 0.98"
    note = f"worst of {len(cases)}; mean {sum(shares) / len(shares):.4f}"
    return Row(
        f"energy of a warm refresh by {refresh}, {what}", min(shares), 1.0, None, "share",
        min(shares), target, "exact SVD", note,
    )  # fmt: skip


def recorded_gradients(model: str, quick: bool) -> dict[str, list[tuple[Tensor, Tensor, int]]]:
    """(gradient a gap before, gradient, rank) of each layer, early and late in a training run."""
    steps, gap = (6, 3) if quick else (300, 20)
    config = RunConfig(
        model=model, corpus="markov", method="full-rank", steps=steps, batch=8, sequence_length=128,
    )  # fmt: skip
    config, corpus = checked(config)
    recorded: dict[int, list[Tensor]] = {}
    wanted = {1, 1 + gap, steps - gap - 1, steps - 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, Path(folder) / "run")
        trainer.resume()
        while trainer.updates < steps:
            if trainer.updates in wanted:
                tokens, targets = corpus.batch(
                    "train", trainer.updates, batch=8, sequence_length=128, seed=0
                )
                trainer.model.loss(tokens, targets).backward()  # type: ignore[no-untyped-call]
                recorded[trainer.updates] = [
                    p.grad.clone()
                    for p in partition(trainer.model, TARGETS)[0]
                    if p.grad is not None
                ]
                trainer.model.zero_grad(set_to_none=True)
            trainer.advance()
    ranks = [config.size.hidden_size // 4] * len(recorded[1])
    return {
        f"gradients of {model}, {when} in training": list(
            zip(recorded[before], recorded[now], ranks, strict=True)
        )
        for when, before, now in (
            ("early", 1, 1 + gap), ("late", steps - gap - 1, steps - 1),
        )
    }  # fmt: skip


def refactorization(quick: bool) -> Row:
    m, n, r, rounds = (32, 48, 8, 1) if quick else (2048, 5461, 512, 3)
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(n, m, bias=False), r, init="kaiming")
    start = [p.detach().clone() for p in layer.factors()]
    before = layer.dense_weight().detach().double()

    def restart() -> None:
        with torch.no_grad():
            for p, value in zip(layer.factors(), start, strict=True):
                p.copy_(value)

    def full_svd() -> None:
        with torch.no_grad():
            B, A = layer.factors()
            U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
            root = S[:r].sqrt()
            B.copy_(U[:, :r] * root)
            A.copy_(root[:, None] * Vh[:r])

    refactorize_(layer)
    error = relative_error(layer.dense_weight().detach(), before)
    check("refactorization", error, 1e-6)
    seconds = take_turns(
        {"ours": lambda: refactorize_(layer), "peer": full_svd}, rounds, before=restart
    )
    return Row(
        f"refactorization, {m}×{n}, rank {r}", 1e3 * median(seconds["ours"]),
        1e3 * median(seconds["peer"]), None, "ms", ratio(seconds["peer"], seconds["ours"]), "≥ 40",
        "full SVD of B·A", f"relative error of the product {error:.1e}",
    )  # fmt: skip


def spectral_start(m: int, n: int) -> Row:
    """The decomposition of one weight for a spectral start, rank a quarter of m."""
    W = 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    U, S, Vh = truncated_svd(W, m // 4)
    exact = torch.linalg.svdvals(W.double())
    check("singular values", relative_error(S, exact), 1e-6)
    left = relative_error((U * S[: m // 4]) @ Vh, W.double()) / float(
        exact[m // 4 :].norm() / exact.norm()
    )
    seconds = take_turns(
        {
            "ours": lambda: truncated_svd(W, m // 4),
            "peer": lambda: torch.linalg.svd(W, full_matrices=False),
        },
        1,
    )
    return Row(
        f"spectral start of a weight, {m}×{n}", 1e3 * median(seconds["ours"]),
        1e3 * median(seconds["peer"]), None, "ms", ratio(seconds["peer"], seconds["ours"]), "",
        "full SVD", f"error against the best approximation's: {left:.6f} ×",
    )  # fmt: skip
