"""The loop of methods that treat all parameters alike, matrices or not (SPAM, Stable-SPAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW, check_last_group
from lowrank_lab.optim.checks import require_adam, require_int, require_known_keys


class UniformAdam(ProjectedAdamW):
    """Adam whose `update_` is called for every parameter; groups have no `rank`.

    Every default is also a key of a group. `update_` applies weight decay itself.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        torch.optim.Optimizer.__init__(self, params, {**defaults, "correct_bias": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        require_known_keys(param_group, self.defaults)
        torch.optim.Optimizer.add_param_group(self, param_group)
        check_last_group(self)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse values of a group that are out of range."""
        require_adam(group)
        require_int("update_proj_gap", group["update_proj_gap"], 1)

    def dim_of(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return self.shard_dim(group, shape)

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._update_each_([p for p in params if p.numel() > 0], group)
