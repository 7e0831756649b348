"""GaLore (2403.03507): Adam in a low-rank subspace of the gradient, recomputed periodically."""

from __future__ import annotations

from typing import Any, ClassVar

from lowrank_lab.optim.projecting import project_back_add_, projected_gradient
from lowrank_lab.optim.projection import (
    get_projections,
)
from lowrank_lab.optim.subspace_adamw import SubspaceAdamW


class GaLore(SubspaceAdamW):
    """GaLore's AdamW, a drop-in for `galore_torch.GaLoreAdamW`.

    Keys of a ranked group (default):

    * `rank`: r.
    * `update_proj_gap` (200): steps between two projections.
    * `scale` (0.25): the paper's α.
    * `proj_type` (std): std | reverse_std | left | right | full.
    * `refresh` (auto): svd, exact and equal to the package | subspace (`iterated_subspaces`) |
      randomized | gram, exact with other rounding | auto: subspace on a GPU, svd elsewhere.
    * `spread_refresh` (False, as in the package): each matrix is refreshed at another step of the
      gap.
    * `on_refresh` (keep, as in the package): keep | reset | transport, what a refresh does to
      Adam's moments (`SubspaceAdamW`).

    Source: 2403.03507, algorithm 2.
    """

    in_8_bits: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "auto",
        "spread_refresh": False, "on_refresh": "keep",
    }  # fmt: skip

    loads_from: ClassVar[tuple[str, ...]] = (
        *SubspaceAdamW.loads_from, "galore_torch", "pytorch_optimizer.GaLore",
    )  # fmt: skip

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        # P = leading singular vectors of G;  R = Pᵀ G;  N = Adam(R);  W ← W − lr · scale · P N
        left, right = get_projections(self, state, G, group)
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        project_back_add_(W, N, left, right, alpha=-step_size * group["scale"])
