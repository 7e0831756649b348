"""What the optimizers share whose moments live in a subspace that a refresh replaces."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.carried import ON_REFRESH
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.projection import (
    PROJ_TYPES,
    check_projection,
    is_refresh_due,
    projected_shapes,
    unprojected_dim,
)
from lowrank_lab.optim.sharded_refresh import refresh_sharded_


class SubspaceAdamW(ProjectedAdamW):
    """Adam on projected gradients; the projections are replaced every `update_proj_gap` steps.

    A refresh does to Adam's moments what the group key `on_refresh` says:

    * `keep`: nothing. They belong to the old basis.
    * `reset`: both moments and their weights become zero and the growth limiter starts again, as in
      `reset_momentum_` of the matrix. The state's `step`, on which refreshes depend, counts on.
    * `transport`: both follow the basis (`carried.py`). A refresh that permutes and flips the
      basis changes no step; any other turn of it leaves the first moment of W's gradient unchanged.

    Matrices whose refreshes are spread and reset Adam have other bias corrections each, so that on
    CUDA they are updated one by one.

    A subclass names the values of its group keys and adds `update_`.
    """

    proj_types: ClassVar[tuple[str, ...]] = PROJ_TYPES
    on_refresh: ClassVar[tuple[str, ...]] = ON_REFRESH

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_projection(group, self.proj_types, self.on_refresh)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        return super().state_shapes(group, shape) | projected_shapes(group, shape)

    def can_stack(self, group: dict[str, Any]) -> bool:
        return True

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return unprojected_dim(group, shape)

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        refresh_sharded_(self, params, group)

    def restarts(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state[p]
        if group.get("on_refresh") != "reset" or "exp_avg" not in state:
            return False
        self.param = p
        return is_refresh_due(self, state, group)
