"""torch's Muon, with few kernels for many matrices on CUDA's path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.optim.found_inf import add_, decay_, lerp_, off_where
from lowrank_lab.optim.stacks import limited

LAST_NS_STEPS = 99  # torch raises for more


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with the same arguments and states.

    On CUDA's path the momenta of matrices with equal shorter sides are orthogonalized together,
    otherwise one by one, by torch. (Without Nesterov, torch's own step also overwrites bfloat16
    momenta, dividing them by their norms; the joint step does not.)
    """

    found_inf: Tensor | None = None  # a flag on the device, as GradScaler sets it
    # for resets, as torch's Muon: `step` is another one
    state_layout: ClassVar[dict[str, Any]] = {"first": ("momentum_buffer",), "partial": "buffer"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        together = all(prefers_few_kernels(p) and not is_dtensor(p) for p in params)
        if not together or any(g["ns_steps"] > LAST_NS_STEPS for g in self.param_groups):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with off_where(self.found_inf):
            for group in self.param_groups:
                for batch in _batches([p for p in group["params"] if p.grad is not None]):
                    self._update_many_(batch, group)
        return loss

    def _update_many_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        found: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group({**group, "params": params}, found, grads, momenta)
        # M ← μM + (1−μ)G;  U = (1−μ)G + μM (Nesterov) or M;  W ← W − lr·adjusted · U Vᵀ of U
        lerp_(momenta, grads, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(grads, momenta, group["momentum"]))
        lr = float(group["lr"])
        orthogonal = orthogonalized(
            updates, group["ns_coefficients"], group["ns_steps"], group["eps"],
            scale=lambda U: _adjust_lr(lr, group["adjust_lr_fn"], U.shape),
        )  # fmt: skip
        if group["weight_decay"] > 0:
            decay_(params, lr * group["weight_decay"])
        add_(params, orthogonal, alpha=-1.0)


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one dtype and device, those of one form next to each other."""

    def kind(p: Tensor) -> Any:
        return str(p.device), str(p.dtype), str(p.grad.dtype if p.grad is not None else None)

    for _, same in groupby(sorted(params, key=lambda p: (kind(p), *_form(p))), kind):
        yield from limited(list(same))


def _form(X: Tensor) -> tuple[int, int, bool]:
    """Shorter and longer side of a matrix, and whether it is wide."""
    m, n = X.shape
    return min(m, n), max(m, n), m <= n


def orthogonalized(
    updates: list[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
    scale: Callable[[Tensor], float] = lambda U: 1.0,
) -> list[Tensor]:
    """Newton and Schulz's iteration X ← aX + (bA + cA²)X with A = X Xᵀ, as in torch's Muon.

    Args:
        updates: matrices in the order of their forms (`_form`), each m×n.
        coefficients: a, b and c.
        steps: iterations.
        eps: least norm by which a matrix is divided.
        dtype: of the iteration; torch's is bfloat16.
        scale: a factor of the result, from an update; it is part of the last product.

    Returns:
        Contiguous tensors shaped like the updates, in their dtype.
    """
    results: list[Tensor] = []
    for _, rows in groupby(updates, lambda U: _form(U)[0]):  # one Gram matrix (r×r) for each
        stacks = [list(same) for _, same in groupby(rows, lambda U: (*_form(U)[:2], scale(U)))]
        scales = [scale(same[0]) for same in stacks]
        Xs = [torch.stack([U if _form(U)[2] else U.mT for U in same]).to(dtype) for same in stacks]
        for X, same in zip(_iterated(Xs, coefficients, steps, eps, scales), stacks, strict=True):
            tall = sum(not _form(U)[2] for U in same)
            parts = (X[:tall].mT, X[tall:])
            for part in parts:
                results += part.to(same[0].dtype).contiguous().unbind() if len(part) else ()
    return results


def _iterated(
    Xs: list[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    scales: list[float],
) -> list[Tensor]:
    """`orthogonalized` of stacks (k×r×n) with the same r ≤ n, and a factor of each."""
    a, b, c = coefficients
    counts = [len(X) for X in Xs]
    norms = Xs[0].new_empty(sum(counts))
    for X, norm in zip(Xs, torch.split(norms, counts), strict=True):
        torch.linalg.vector_norm(X, dim=(-2, -1), out=norm)
    norms = norms.clamp_(min=eps)[:, None, None]
    for X, norm in zip(Xs, torch.split(norms, counts), strict=True):
        X.div_(norm)
    gram = Xs[0].new_empty((sum(counts), Xs[0].shape[1], Xs[0].shape[1]))
    if not steps:
        return [X * s for X, s in zip(Xs, scales, strict=True)]
    factors = [[1.0] * len(Xs)] * (steps - 1) + [scales]
    for now in factors:
        for X, A in zip(Xs, torch.split(gram, counts), strict=True):
            torch.bmm(X, X.mT, out=A)
        polynomials = torch.split(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), counts)
        Xs = [
            torch.baddbmm(X, B, X, beta=a * s, alpha=s)
            for X, B, s in zip(Xs, polynomials, now, strict=True)
        ]
    return Xs
