"""SPAM (2501.06842): Adam with clipping of gradient spikes and periodic momentum resets.

Shapes in this file: a parameter and its gradient have any shape. With a mask, k entries of an m×n
matrix are trained; their weights, gradients and moments are vectors of length k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.distributed.dtensors import ANY_DIM
from lowrank_lab.optim.adam import adam_update_
from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require, require_int
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.found_inf import decay_, zero_
from lowrank_lab.optim.matrix_updates import SEED_STRIDE
from lowrank_lab.optim.stacks import Stacks, moments_of, tensors_of
from lowrank_lab.optim.state_bytes import Weight
from lowrank_lab.optim.uniform import UniformAdam

Entries = tuple[Tensor, ...]  # rows (k) and columns (k) of the trained entries of a matrix


class Spam(UniformAdam):
    """SPAM, equal to `pytorch_optimizer.SPAM` at density 1.

    Each parameter counts its own steps t = 1, 2, …; k = t mod update_proj_gap is the number of
    steps since its last reset. ε is added to √v before the bias correction; weight decay is
    decoupled and applied after the update.

    A reset of SPAM clears the moments but not their weights, `exp_avg_weight` and
    `exp_avg_sq_weight`: the bias correction continues as if nothing had been cleared. For some
    steps m / w₁ is therefore too small and √(v / w₂) far too small, which the warm-up compensates.
    `techniques.reset_momentum_` scales moments and weights together, an exact restart of Adam; it
    does not change the period of SPAM's own resets, its warm-up or its masks.

    An entry with v = 0 when clipping begins (the embedding of a token that has not occurred since
    the reset) is clipped to 0 until the next reset, as in the published code. A threshold of 0 in
    the group of the embeddings avoids that.

    With a density lower than 1, an entry in both the old and the new mask keeps its moments at a
    reset; all others start from zero. (The published code clears the kept moments one step later.)
    Entries outside the mask don't change, not even by weight decay.

    Args:
        params: tensors or groups; every option below is also a key of a group.
        lr: learning rate, absolute.
        betas: decay rates of the first and second moment.
        eps: added to √v before bias correction.
        weight_decay: decoupled, lr · weight_decay.
        threshold: θ; gradients with |g|² > θ·v are clipped to ±√(θ·v). 0 never clips.
        update_proj_gap: ΔT, steps between two resets.
        warmup: T, steps of the cosine warm-up after a reset.
        grad_accu_steps: clipping begins this many steps after a reset (and after the start).
        density: share of the entries of each matrix that is trained, drawn again at each reset.
            Without a mask at 1, and for tensors that aren't matrices.

    Raises:
        ValueError: a value out of range or an unknown key of a group.
    """

    loads_from: ClassVar[tuple[str, ...]] = ("pytorch_optimizer.SPAM",)

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
        require("threshold", group["threshold"], group["threshold"] >= 0, "at least 0")
        for key in ("warmup", "grad_accu_steps"):
            require_int(key, group[key], 0)
        require("density", group["density"], 0 < group["density"] <= 1, "in (0, 1]")

    def can_stack(self, group: dict[str, Any]) -> bool:
        return bool(group["density"] == 1)

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return ANY_DIM if group["density"] == 1 or len(shape) != 2 else None

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        if group["density"] == 1 or len(shape) != 2:
            return super().state_shapes(group, shape)
        trained = (_count(torch.Size(shape), group["density"]),)
        return super().state_shapes(group, trained) | {"mask": shape}

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        t = state["step"] + 1
        since_reset = t % group["update_proj_gap"]
        resets = since_reset == 0
        entries = self._entries(W, state, group["density"], redraw=resets)
        w, g = (W, G) if entries is None else (W[entries], G[entries])
        ms, vs = moments_of(state, w)
        if resets and entries is None:
            zero_([*ms, *vs])
        if group["threshold"] > 0 and since_reset >= group["grad_accu_steps"]:
            g = _clipped(g, vs, group["threshold"])
        if t >= group["update_proj_gap"]:
            step_size *= warmup_factor(since_reset, group["warmup"])
        ws, gs = tensors_of(w), tensors_of(g)
        adam_update_(ws, gs, ms, vs, step_size=step_size, betas=group["betas"], eps=group["eps"])
        if group["weight_decay"] > 0:
            decay_(ws, group["lr"] * group["weight_decay"])
        if entries is not None:
            W.index_put_(entries, w)

    def _entries(
        self, W: Tensor, state: dict[str, Any], density: float, *, redraw: bool
    ) -> Entries | None:
        """Rows and columns of the trained entries of W (m×n); None: all are trained."""
        if density == 1 or W.ndim != 2:
            return None
        if redraw or "mask" not in state:
            index = param_index(self, self.param) - 1
            old = state.get("mask")
            state["mask"] = random_mask(W, density, seed=SEED_STRIDE * index + state["step"])
            if old is not None:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = _moved(state[name], old, state["mask"])
        return _where(state["mask"], density)


def _clipped(g: Tensor | Stacks, vs: list[Tensor], threshold: float) -> Tensor | Stacks:
    """`clip_spikes` of a gradient, or of all of a stack at once."""
    if isinstance(g, Tensor):
        return clip_spikes(g, vs[0], threshold)
    return Stacks(g.shapes, _clip_stacks(g, Stacks.of(vs), threshold))


@Chain
def _clip_stacks(g: Stacks, vs: Stacks, threshold: float) -> Tensor:
    return clip_spikes(g.flat, vs.flat, threshold)


def clip_spikes(g: Tensor, exp_avg_sq: Tensor, threshold: float) -> Tensor:
    """g where |g|² ≤ θ·v, otherwise sign(g)·√(θ·v); a new tensor, shaped like g."""
    # |g|² > θ·v  ⇔  |g| > √(θ·v):  g ← sign(g) · min(|g|, √(θ·v))
    bound = (threshold * exp_avg_sq).sqrt_()
    return torch.minimum(bound, g.abs(), out=bound).copysign_(g)


def warmup_factor(steps_since_reset: int, warmup: int) -> float:
    """Factor of the learning rate k steps after a reset of SPAM; 1 from k = T = `warmup` on.

    1 − 0.99 · (1 + cos(π (k+1) / (T+1))) / 2
    """
    progress = min(steps_since_reset + 1, warmup + 1) / (warmup + 1)
    return 1 - 0.99 * (1 + math.cos(math.pi * progress)) / 2


def _count(shape: torch.Size, density: float) -> int:
    return max(1, int(density * shape.numel()))


def random_mask(like: Tensor, density: float, seed: int) -> Tensor:
    """A random boolean mask (m×n) with exactly max(1, ⌊density·m·n⌋) entries set."""
    generator = torch.Generator(like.device).manual_seed(seed)
    order = torch.randperm(like.numel(), generator=generator, device=like.device)
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[order[: _count(like.shape, density)]] = True
    return mask.view(like.shape)


def _where(mask: Tensor, density: float) -> Entries:
    # nonzero_static needs the number of entries, and so has a shape under fake tensors and compile.
    at = torch.nonzero_static(mask, size=_count(mask.shape, density))  # k×2
    return at.unbind(1)


def _moved(moment: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A moment (k) of the old mask's entries, for those of the new mask; 0 for new entries."""
    size = moment.numel()
    dense = torch.zeros(old.shape, dtype=moment.dtype, device=moment.device)
    dense[torch.nonzero_static(old, size=size).unbind(1)] = moment
    return dense[torch.nonzero_static(new, size=size).unbind(1)]


def spam_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of m and v of the entries in the mask, and of the mask, a byte per entry."""
    density = config.method_options["density"]
    if density == 1 or w.ndim != 2:
        return 2 * w.nbytes
    return 2 * int(density * w.numel()) * w.itemsize + w.numel()
