"""Adam's moments and update as functions of a state, shared by all optimizers of this package.

Besides the moments, a state has the sum of the weights in each moving average: w₁ ← β₁w₁ + 1 − β₁,
and w₂ likewise. Starting from zero, they equal the usual 1 − βᵗ. A momentum reset of any strength
scales them together with the moments, so that bias correction stays exact
(`techniques.reset_momentum_`); a step count could not express that.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.optim.found_inf import found_inf, zero_

# of the moments: that of the weights, float32, or blocks of 8 bits (`optim.eight_bit`)
PRECISIONS = ("same", "fp32", "8bit")
# A step count at which 1 − βᵗ is 1 for every β: torch's fused kernel then corrects no bias.
_LONG_AGO = 1e12
MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p − step_size · m / (√v + ε), fused, in place.

    `step_size` includes the bias correction. All tensors of one call share a dtype and a device:
    the kernel is called without torch's grouping by both, which takes about 50 µs per call on a
    CPU. It walks through memory, so that tensors of other strides than their parameter's
    (channels-last weights, expanded gradients) are copied first. The kernel knows the flag of
    `found_inf.off_where`.
    """
    given = list(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True))
    used = [_alike(tensors) for tensors in given]
    ps, gs, ms, vs = zip(*used, strict=True)
    long_ago = _long_ago(params[0].device, getattr(params[0], "fake_mode", None))
    torch._fused_adamw_(
        ps, gs, ms, vs, [], [long_ago] * len(params),
        lr=step_size, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=eps,
        amsgrad=False, maximize=False, found_inf=found_inf(),
    )  # fmt: skip
    for tensors, copies in zip(given, used, strict=True):
        if copies is not tensors:
            for i in (0, 2, 3):  # p, m and v; the gradient hasn't changed
                tensors[i].copy_(copies[i])


@lru_cache(maxsize=16)
def _long_ago(device: torch.device, fake_mode: Any) -> Tensor:
    """A step count for every call on a device, filled once.

    It is made outside of all modes: traces of memory then see it neither in a first run nor later.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        if fake_mode is not None:  # fake tensors belong to a mode
            empty = torch.empty((), dtype=torch.float32, device="meta")
            return FakeTensor(fake_mode, empty, device)
        return torch.full((), _LONG_AGO, dtype=torch.float32, device=device)


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _alike(tensors: Four) -> Four:
    """p, g, m and v with one layout in memory, without gaps: themselves or copies."""
    p, strides = tensors[0], tensors[0].stride()
    dense = p.is_contiguous() or torch.empty_like(p).stride() == strides
    if dense and all(t.stride() == strides for t in tensors):
        return tensors
    p, g, m, v = (torch.empty_like(p).copy_(t) for t in tensors)
    return p, g, m, v


def adam_direction(
    g: Tensor,
    state: dict[str, Any],
    betas: tuple[float, float],
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Update the moments with g; return N = m / (√v + ε), shaped like g, bias not corrected."""
    N = torch.zeros_like(g) if out is None else out.zero_()
    m, v = adam_moments(state, g)
    adam_update_([N], [g], [m], [v], step_size=-1.0, betas=betas, eps=eps)
    return N


def adam_moments(state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments m and v from a state; zeros shaped like `like` are created at first use."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state["exp_avg"], state["exp_avg_sq"]


def advance_weights_(state: dict[str, Any], betas: tuple[float, float]) -> None:
    """One step of the weights of both moments: w ← βw + 1 − β, from zero."""
    if "step" not in state:
        state.update(step=0, exp_avg_weight=0.0, exp_avg_sq_weight=0.0)
    beta1, beta2 = betas
    state["exp_avg_weight"] = beta1 * state["exp_avg_weight"] + 1 - beta1
    state["exp_avg_sq_weight"] = beta2 * state["exp_avg_sq_weight"] + 1 - beta2


def restart_adam_(state: dict[str, Any]) -> None:
    """Set both moments and their weights to zero, in place."""
    zero_([state[name] for name in MOMENTS])
    for name in MOMENTS:
        state[f"{name}_weight"] = 0.0


def bias_corrected_lr(state: dict[str, Any], group: dict[str, Any]) -> float:
    """lr · √w₂ / w₁: the learning rate times both bias corrections."""
    lr = float(group["lr"])
    if not group["correct_bias"]:
        return lr
    return lr * math.sqrt(state["exp_avg_sq_weight"]) / float(state["exp_avg_weight"])


def eps_after_correction(state: Any, group: dict[str, Any]) -> float:
    """ε·√w₂, added to √v: equal to adding ε to √v̂ after the bias correction."""
    eps = float(group["eps"])
    return eps * math.sqrt(state["exp_avg_sq_weight"]) if group["correct_bias"] else eps


def to_state_precision(g: Tensor, group: dict[str, Any]) -> Tensor:
    """A gradient in the dtype of the group's moments."""
    return g.to(state_dtype(g.dtype, group))


def state_dtype(dtype: torch.dtype, group: dict[str, Any]) -> torch.dtype:
    """The dtype in which the group's moments are updated, for gradients of that dtype."""
    precision = group.get("state_precision", "same")
    if precision == "8bit":
        return torch.float32
    return dtype if precision == "same" else torch.promote_types(dtype, torch.float32)


def rounds_stochastically(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether updates of p are rounded at random: bfloat16 weights of a group that asks for it."""
    return bool(group.get("stochastic_rounding")) and p.dtype == torch.bfloat16


def random_bits(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Random numbers of 16 bits (int32) of that shape, for `stochastic_round`."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32, device=device)


def stochastic_round(W: Tensor, bits: Tensor) -> Tensor:
    """Round W (float32) up or down to bfloat16, unbiased, by random bits shaped like W."""
    # bfloat16 is the upper half of float32: a random lower half carries into it or not.
    return (W.view(torch.int32) + bits).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def is_quantized(t: Any) -> bool:
    """Whether a state is a wrapper around several tensors, such as torchao's 8-bit moments."""
    return is_traceable_wrapper_subclass(t) and not is_dtensor(t)
