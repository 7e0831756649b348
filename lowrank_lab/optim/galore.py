"""GaLore (2403.03507): Adam in a low-rank subspace of the gradient that is renewed now and then."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.projection import (
    check_projection,
    lift_add_,
    projected,
    refresh_parts_,
    refreshed,
    unprojected,
)


class GaLore(ProjectedAdamW):
    """GaLore's AdamW, a drop-in for `galore_torch.GaLoreAdamW`.

    Keys of a ranked group: `rank`; `update_proj_gap`, steps between two projections (200); `scale`,
    the paper's α (0.25); `proj_type`, std | reverse_std | left | right | full; `refresh`, svd
    (exact, equal to the package) | randomized | gram (exact, with other rounding; see
    `gram_subspaces`); `spread_refresh`, whether each matrix is refreshed at another step of the gap
    (False, as in the package).
    """

    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "svd",
        "spread_refresh": False,
    }  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_projection(group)

    def cut(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return unprojected(group, shape) if group["refresh"] == "gram" else None

    def prepare_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        refresh_parts_(self, params, group)

    def update_(
        self, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
    ) -> None:
        # P = leading singular vectors of G;  R = Pᵀ G;  N = Adam(R);  W ← W − lr · scale · P N
        left, right = refreshed(self, state, G, group)
        R = projected(G, left, right, group)
        N = self.adam_direction(R, state, group)
        lift_add_(W, N, left, right, alpha=-step_size * group["scale"])
