"""Stable-SPAM (2502.17055): Adam on clipped and normalized gradients, with momentum resets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.distributed.dtensors import ANY_DIM
from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.adam import adam_update_, restart_adam_
from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require
from lowrank_lab.optim.found_inf import decay_
from lowrank_lab.optim.stacks import Matrices, StackedStates, Stacks, State, moments_of, tensors_of
from lowrank_lab.optim.state_bytes import SCALAR, Weight
from lowrank_lab.optim.uniform import UniformAdam
from lowrank_lab.optim.whole_tensors import tensors_in

# Moving averages of max|g|, ‖g‖ and ‖g‖² per parameter (0-dimensional, float32 or wider)
AVERAGES = ("max_average", "norm_average", "norm_sq_average")


class StableSpam(UniformAdam):
    """Stable-SPAM, equal to `pytorch_optimizer.StableSPAM` without its `t_max`.

    ε is added to √v̂ after the bias correction and weight decay is applied before the update, as in
    torch's AdamW. Each parameter counts its own steps T = 1, 2, …; Adam restarts, with its bias
    correction, at every multiple of update_proj_gap. Resets, also those of
    `techniques.reset_momentum_`, do not change the averages of AdaClip and AdaGN or the step count.

    A zero gradient is treated like any other: it enters all averages, and the momentum still moves
    the parameter. (pytorch_optimizer skips the parameter in such a step, but counts the step in its
    bias corrections.)

    Args:
        params: tensors or groups; every option below is also a key of a group.
        lr: learning rate, absolute.
        betas: decay rates of the first and second moment.
        eps: added to √v̂ and to √ŝ, both after bias correction.
        weight_decay: decoupled, lr · weight_decay.
        gamma1: γ₁, decay rate of the average of ‖g‖.
        gamma2: γ₂, decay rate of the average of ‖g‖².
        theta: θ, decay rate of the average of max|g|.
        update_proj_gap: steps between two resets of the moments.

    Raises:
        ValueError: a value out of range or an unknown key of a group.
    """

    loads_from: ClassVar[tuple[str, ...]] = ("pytorch_optimizer.StableSPAM",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        update_proj_gap: int = 1000,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma1": gamma1,
            "gamma2": gamma2, "theta": theta, "update_proj_gap": update_proj_gap,
        }  # fmt: skip
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for key in ("gamma1", "gamma2", "theta"):
            require(key, group[key], 0 <= group[key] < 1, "in [0, 1)")

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        averages: Shapes = dict.fromkeys(AVERAGES, ())
        return super().state_shapes(group, shape) | averages

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return ANY_DIM

    def _advanced_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if "exp_avg" in state and (state["step"] + 1) % group["update_proj_gap"] == 0:
            restart_adam_(state)
        return super()._advanced_state(p, group)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        g = clip_and_normalize(G, state, state["step"] + 1, group, self.placement)
        ws, gs, (ms, vs) = tensors_of(W), tensors_of(g), moments_of(state, W)
        if group["weight_decay"] > 0:
            decay_(ws, group["lr"] * group["weight_decay"])
        # W ← W − lr · m̂ / (√v̂ + ε) = W − lr · √w₂/w₁ · m / (√v + ε·√w₂)
        eps = group["eps"] * math.sqrt(state["exp_avg_sq_weight"])
        adam_update_(ws, gs, ms, vs, step_size=step_size, betas=group["betas"], eps=eps)


def clip_and_normalize(
    G: Matrices,
    state: State | StackedStates,
    T: int,
    group: dict[str, Any],
    placement: Placement = REPLICATED,
) -> Matrices:
    """AdaClip and AdaGN of a gradient, shaped like G; its moving averages are replaced.

    Args:
        G: the gradient, of any shape, not changed; or stacks of them, whose buffer is changed.
        state: has the moving averages m, n, s of max|g|, ‖g‖ and ‖g‖², zeros at first.
        T: the number of this step, from 1, for their bias corrections.
        group: has gamma1, gamma2, theta and eps.
        placement: of the gradient, if G is a local shard.
    """
    averages = _averages(state, G)
    decays = group["theta"], group["gamma1"], group["gamma2"]
    corrections = [_number(1 - decay**T, G) for decay in decays]
    scaled, *new = _clip_and_normalize_(
        G, *averages, *decays, *corrections, group["eps"], placement
    )
    for name, average in zip(AVERAGES, new, strict=True):
        state[name] = average
    return Stacks(G.shapes, G.flat) if isinstance(G, Stacks) else scaled


@Chain
def _clip_and_normalize_(
    G: Matrices, m: Tensor, n: Tensor, s: Tensor, theta: float, gamma1: float, gamma2: float,
    of_m: float | Tensor, of_n: float | Tensor, of_s: float | Tensor, eps: float,
    placement: Placement,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """The scaled gradient, None of stacks, which are changed; the averages, replaced.

    `of_m`, `of_n` and `of_s` are the bias corrections of the averages.
    """
    # AdaClip: m ← θm + (1−θ) max|g|;  m̂ = m / (1 − θᵀ);  g ← g · m̂ / max|g| where |g| > m̂.
    # The quotient is 0/0 of a zero gradient, in which nothing is larger than m̂.
    each = tensors_in(G, m.dtype)
    peak = placement.all_reduce_max_(each.largest())
    m = m.lerp(peak, 1 - theta)
    m_hat = m / of_m
    each.scale_larger_(m_hat, m_hat / peak)
    # AdaGN: n ← γ₁n + (1−γ₁)‖g‖;  s ← γ₂s + (1−γ₂)‖g‖²;  g ← g/‖g‖ · n̂ / (√ŝ + ε)
    norm = placement.global_norm(each.norm())
    n, s = n.lerp(norm, 1 - gamma1), s.lerp(norm.square(), 1 - gamma2)
    length = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    scaled = each.scale_(n / of_n / ((s / of_s).sqrt() + eps) / length)
    return scaled if isinstance(scaled, Tensor) else None, m, n, s


def _number(value: float, G: Matrices) -> float | Tensor:
    """A number that changes in each step: of stacks a tensor, on the CPU, for compiled chains."""
    return value if isinstance(G, Tensor) else torch.tensor(value, dtype=torch.float64)


def _averages(state: State | StackedStates, G: Matrices) -> list[Tensor]:
    """The averages of max|g|, ‖g‖ and ‖g‖²; zeros at first."""
    if AVERAGES[0] in state:
        return [state[name] for name in AVERAGES]
    wide = torch.promote_types(G.dtype, torch.float32)
    shape = () if isinstance(G, Tensor) else (len(G.tensors),)
    device = tensors_of(G)[0].device
    return [torch.zeros(shape, dtype=wide, device=device) for _ in AVERAGES]


def stable_spam_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of m, v, the running maximum, the norm and the squared norm."""
    return 2 * w.nbytes + 3 * SCALAR
