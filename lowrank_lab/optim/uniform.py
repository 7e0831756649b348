"""The loop of methods that treat all parameters alike, matrices or not (SPAM, Stable-SPAM)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.checks import require_int


class UniformAdam(ProjectedAdamW):
    """Adam whose `update_` is called for every parameter; groups have no `rank`.

    Every default is also a key of a group. `update_` applies weight decay itself.
    """

    has_ranked_groups: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        torch.optim.Optimizer.__init__(self, params, {**defaults, "correct_bias": True})

    def check_any_group(self, group: dict[str, Any]) -> None:
        super().check_any_group(group)
        self.check_group(group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse values of a group that are out of range."""
        require_int("update_proj_gap", group["update_proj_gap"], 1)

    def dim_of(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return self.shard_dim(group, shape)

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._update_each_([p for p in params if p.numel() > 0], group)
