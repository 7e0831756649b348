"""Methods with an average of gradients and no Adam on their matrices: what they share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.adam import advance_weights_
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import is_number, require
from lowrank_lab.optim.found_inf import lerp_
from lowrank_lab.optim.stacks import Matrices, StackedStates, State, tensors_of

NUMBERS = ("step", "exp_avg_weight", "exp_avg_sq_weight")
NS_PRECISIONS = ("bf16", "fp32")


class MomentumOptimizer(ProjectedAdamW):
    """AdamW whose marked groups keep an average of gradients with the decay rate `momentum`.

    Weight decay is decoupled and applied before the update, in all groups. Groups of plain AdamW
    have the learning rate lr · adam_scale.
    """

    decays_first: ClassVar[bool] = True

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, adam_scale: float,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "adam_scale": adam_scale, "correct_bias": True, "state_precision": "same",
            "stochastic_rounding": False,
        }  # fmt: skip
        torch.optim.Optimizer.__init__(self, params, defaults)

    def check_any_group(self, group: dict[str, Any]) -> None:
        super().check_any_group(group)
        scale = group["adam_scale"]
        require("adam_scale", scale, is_number(scale) and 0 <= scale < math.inf, "at least 0")

    def check_group(self, group: dict[str, Any]) -> None:
        name, shown = type(self).__name__, group[self.marker]
        for key, only in (("state_precision", "same"), ("stochastic_rounding", False)):
            require(key, group[key], group[key] == only, f"{name} supports only {only}")
        value = group["momentum"]
        require("momentum", value, is_number(value) and 0 <= value < 1, "in [0, 1)")
        for p in group["params"]:
            require(self.marker, shown, p.ndim == 2, f"only for matrices, not {tuple(p.shape)}")

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        if not self.acts_on(group):
            return super().state_shapes(group, shape)
        return {**dict.fromkeys(NUMBERS), "exp_avg": shape}

    def can_stack(self, group: dict[str, Any]) -> bool:
        return True

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not self.acts_on(group):
            group = {**group, "lr": float(group["lr"]) * group["adam_scale"]}
        super().step_group_(params, group)

    def _advanced_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not self.acts_on(group):
            return super()._advanced_state(p, group)
        state: dict[str, Any] = self.state[p]
        advance_weights_(state, (group["momentum"], 0.0))
        return state


def averaged(state: State | StackedStates, G: Matrices, beta: float) -> list[Tensor]:
    """M ← βM + (1−β)G of one matrix, or of each of many, from zero; returns the M."""
    states = [state] if isinstance(state, dict) else state.states
    grads = tensors_of(G)
    for each, g in zip(states, grads, strict=True):
        if "exp_avg" not in each:
            each["exp_avg"] = torch.zeros_like(g, memory_format=torch.preserve_format)
    averages: list[Tensor] = [each["exp_avg"] for each in states]
    lerp_(averages, grads, 1 - beta)
    return averages


def ns_dtype(dtype: torch.dtype, group: dict[str, Any]) -> torch.dtype:
    """The dtype of Newton and Schulz's iteration for gradients of that dtype."""
    if group["ns_precision"] == "bf16":
        return torch.bfloat16
    return torch.promote_types(dtype, torch.float32)
