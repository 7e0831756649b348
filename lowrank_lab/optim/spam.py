"""SPAM (2501.06842): Adam that clips spikes of the gradient and forgets its moments now and then.

Shapes in this file: a parameter p and its gradient have any shape; with a mask, k entries of an m×n
matrix are trained, and their weights, gradients and moments are vectors of length k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim.base import (
    FOREIGN_KEYS,
    ProjectedAdamW,
    _check,
    adam_update_,
    averages,
)

Entries = tuple[Tensor, ...]  # rows (k) and columns (k) of the entries of a matrix that are trained


class UniformAdam(ProjectedAdamW):
    """The loop of methods that treat every parameter alike: `update_` is called for each of them.

    Every default is also a key of a group. Weight decay is left to `update_`.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        torch.optim.Optimizer.__init__(self, params, {**defaults, "correct_bias": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        known = {*FOREIGN_KEYS, *self.defaults}
        for key, value in param_group.items():
            _check(key, value, key in known, f"no such key; known: {', '.join(sorted(known))}")
        torch.optim.Optimizer.add_param_group(self, param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse values of a group that are out of range."""
        betas, gap = group["betas"], group["update_proj_gap"]
        for key in ("lr", "eps", "weight_decay"):
            _check(key, group[key], group[key] >= 0, "at least 0")
        _check("betas", betas, all(0 <= b < 1 for b in betas), "each in [0, 1)")
        whole = isinstance(gap, int) and gap >= 1
        _check("update_proj_gap", gap, whole, "a whole number from 1")

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._update_each_([p for p in params if p.numel() > 0], group)


class Spam(UniformAdam):
    """SPAM, equal to `pytorch_optimizer.SPAM` at density 1.

    Each parameter counts its own steps t = 1, 2, …; k = t mod update_proj_gap is the number of
    steps since its last reset. ε is added to √v before the bias correction, weight decay is
    decoupled and applied after the update.

    SPAM clears its averages at each reset but goes on with the bias correction: their weights,
    `exp_avg_weight` and `exp_avg_sq_weight`, are not cleared with them. For some steps after a
    reset m / w₁ is therefore too small and √(v / w₂) far too small; the warm-up is there for that.
    `techniques.reset_momentum_` scales averages and weights together, which is an exact restart of
    Adam; it leaves the period of SPAM's own resets, its warm-up and its masks alone.

    An entry whose v is still 0 when clipping begins (an embedding of a token not seen since the
    reset) is clipped to 0 until the next reset, here as in the published code. A threshold of 0
    in the group of the embeddings avoids that.

    With a density below 1 the moments of an entry that is in the old mask and in the new one are
    kept at a reset, all others start from zero. (The published code keeps them too, and then
    clears them in the step that follows.) Entries outside the mask don't move, decay included.

    Args:
        params: tensors or groups; every option below is also a key of a group.
        lr: learning rate, absolute.
        betas: decay rates of the two averages.
        eps: added to √v before bias correction.
        weight_decay: decoupled, lr · weight_decay.
        threshold: θ; gradients with |g|² > θ·v are clipped to ±√(θ·v). 0 never clips.
        update_proj_gap: ΔT, steps between two resets.
        warmup: T, steps of the cosine warm-up after a reset.
        grad_accu_steps: clipping begins this many steps after a reset (and after the start).
        density: share of each matrix that is trained, drawn anew at each reset. 1 has no mask,
            and tensors that aren't matrices never have one.

    Raises:
        ValueError: a value out of range or an unknown key of a group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        threshold: float = 5000.0,
        update_proj_gap: int = 500,
        warmup: int = 150,
        grad_accu_steps: int = 20,
        density: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "threshold": threshold, "update_proj_gap": update_proj_gap, "warmup": warmup,
            "grad_accu_steps": grad_accu_steps, "density": density,
        }  # fmt: skip
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        _check("threshold", group["threshold"], group["threshold"] >= 0, "at least 0")
        for key in ("warmup", "grad_accu_steps"):
            whole = isinstance(group[key], int) and group[key] >= 0
            _check(key, group[key], whole, "a whole number from 0")
        _check("density", group["density"], 0 < group["density"] <= 1, "in (0, 1]")

    def update_(
        self, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
    ) -> None:
        t = state["step"] + 1
        since_reset = t % group["update_proj_gap"]
        resets = since_reset == 0
        entries = self._entries(W, state, group["density"], redraw=resets)
        w, g = (W, G) if entries is None else (W[entries], G[entries])
        m, v = averages(state, w)
        if resets and entries is None:
            m.zero_()
            v.zero_()
        if group["threshold"] > 0 and since_reset >= group["grad_accu_steps"]:
            g = clip_spikes(g, v, group["threshold"])
        if t >= group["update_proj_gap"]:
            step_size *= warmup_factor(since_reset, group["warmup"])
        adam_update_(
            [w], [g], [m], [v], step_size=step_size, betas=group["betas"], eps=group["eps"]
        )
        if group["weight_decay"] > 0:
            w.mul_(1.0 - group["lr"] * group["weight_decay"])
        if entries is not None:
            W.index_put_(entries, w)

    def _entries(
        self, W: Tensor, state: dict[str, Any], density: float, *, redraw: bool
    ) -> Entries | None:
        """Rows and columns of the entries of W (m×n) to train; None for all of them."""
        if density == 1 or W.ndim != 2:
            return None
        if redraw or "mask" not in state:
            params = [p for group in self.param_groups for p in group["params"]]
            index = next(i for i, p in enumerate(params) if p is W)
            old = state.get("mask")
            state["mask"] = random_mask(W, density, seed=1_000_003 * index + state["step"])
            if old is not None:
                for name in ("exp_avg", "exp_avg_sq"):
                    _move_(state[name], old, state["mask"])
        return _where(state["mask"], density)


def clip_spikes(g: Tensor, exp_avg_sq: Tensor, threshold: float) -> Tensor:
    """g where |g|² ≤ θ·v, else sign(g)·√(θ·v), shaped like g; g itself is not changed."""
    # |g|² > θ·v  ⇔  |g| > √(θ·v):  g ← sign(g) · min(|g|, √(θ·v))
    bound = (threshold * exp_avg_sq).sqrt_()
    return torch.minimum(bound, g.abs(), out=bound).copysign_(g)


def warmup_factor(steps_since_reset: int, warmup: int) -> float:
    """1 − 0.99 · (1 + cos(π (k+1) / (T+1))) / 2 at k steps after a reset, and 1 from k = T on."""
    progress = min(steps_since_reset + 1, warmup + 1) / (warmup + 1)
    return 1 - 0.99 * (1 + math.cos(math.pi * progress)) / 2


def _count(shape: torch.Size, density: float) -> int:
    return max(1, int(density * shape.numel()))


def random_mask(like: Tensor, density: float, seed: int) -> Tensor:
    """A boolean mask (m×n) with exactly ⌊density·m·n⌋ entries (at least 1), drawn from the seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    order = torch.randperm(like.numel(), generator=generator, device=like.device)
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[order[: _count(like.shape, density)]] = True
    return mask.view(like.shape)


def _where(mask: Tensor, density: float) -> Entries:
    # nonzero_static: the number of entries is known, so that fake tensors and graphs have a shape.
    at = torch.nonzero_static(mask, size=_count(mask.shape, density))  # k×2
    return at.unbind(1)


def _move_(moment: Tensor, old: Tensor, new: Tensor) -> None:
    """Put a moment (k) of the old mask's entries in the new mask's order, 0 where it is new."""
    size = moment.numel()
    dense = torch.zeros(old.shape, dtype=moment.dtype, device=moment.device)
    dense[torch.nonzero_static(old, size=size).unbind(1)] = moment
    moment.copy_(dense[torch.nonzero_static(new, size=size).unbind(1)])
