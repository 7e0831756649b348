"""Refreshes of projections, and refactorization, against the full SVDs of the published code."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, check, median, ratio, relative_error, take_turns
from lowrank_lab.config import SIZES, TARGETS, RunConfig
from lowrank_lab.cpu.onednn_matmul import fast_products
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.methods.build import partition
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim.subspaces import leading_subspaces, randomized_subspaces, sides
from lowrank_lab.techniques import refactorize_
from lowrank_lab.training.preflight import check as checked
from lowrank_lab.training.trainer import Trainer


def rows(quick: bool = False) -> list[Row]:
    return [refresh(quick), *energies(quick), refactorization(quick)]


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


def energies(quick: bool) -> list[Row]:
    """Lowest captured energy of warm over exact refreshes: early, late, and for flat spectra."""
    model = "tiny" if quick else "micro"
    steps, gap = (6, 3) if quick else (300, 20)
    config = RunConfig(
        model=model, corpus="markov", method="full-rank", steps=steps, batch=8, sequence_length=128,
    )  # fmt: skip
    config, corpus = checked(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, Path(folder) / "run")
        trainer.resume()
        recorded: dict[int, list[Tensor]] = {}
        wanted = {1, 1 + gap, steps - gap - 1, steps - 1}
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
    rank = config.size.hidden_size // 4
    early, late = (recorded[1], recorded[1 + gap]), (recorded[steps - gap - 1], recorded[steps - 1])
    torch.manual_seed(0)
    flat = [torch.randn(64, 176) for _ in range(8)], [torch.randn(64, 176) for _ in range(8)]
    found = []
    for name, (before, after) in {"early": early, "late": late, "flat": flat}.items():
        shares = []
        for then, now in zip(before, after, strict=True):
            which = sides("std", now.shape)
            old = leading_subspaces(then, rank, which)
            warm = randomized_subspaces(now, rank, which, seed=1, old=old)
            shares.append(captured(now, warm) / captured(now, leading_subspaces(now, rank, which)))
        flat_one = name == "flat"
        what = "random matrices" if flat_one else f"gradients of {model}, {name} in training"
        note = f"worst of the layers; mean {sum(shares) / len(shares):.4f}"
        found.append(
            Row(
                f"energy of a warm refresh, {what}, rank {rank}",
                min(shares), 1.0, None, "share", min(shares),
                "" if flat_one else "≥ 0.98", "exact SVD", note,
            )
        )  # fmt: skip
    return found


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
