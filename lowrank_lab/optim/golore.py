"""GoLore (2410.11289): GaLore, then random subspaces; the first moment follows each change."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.optim.carried import ON_REFRESH
from lowrank_lab.optim.checks import require_int
from lowrank_lab.optim.columns import is_index
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.matrix_updates import each
from lowrank_lab.optim.projecting import project_back_add_, projected_gradient
from lowrank_lab.optim.projection import (
    gather_projections,
    get_projections,
    load_projections,
    refresh_together_,
    replace_projections_,
)
from lowrank_lab.optim.subspace_adamw import SubspaceAdamW
from lowrank_lab.optim.subspaces import Projections, sides


class GoLore(SubspaceAdamW):
    """GoLore's AdamW: GaLore until the step `switch`, random projections from there on.

    Keys of a ranked group (default):

    * `rank`: r.
    * `update_proj_gap` (200): steps between two projections.
    * `scale` (0.25): as in GaLore.
    * `proj_type` (std): std | reverse_std | left | right | full.
    * `refresh` (auto): auto | svd | subspace | randomized | gram, as in GaLore, for the projections
      before the switch.
    * `switch` (0): steps of GaLore. With 0 all projections are random, the case that the paper
      proves to converge; its language models switch after 80 % of the run.
    * `seed` (0): of the random projections.
    * `on_refresh` (published): at every refresh, also before the switch, the first moment is
      carried into the new subspace and the second one is kept | keep | reset | transport, as in
      GaLore.

    The first refresh at or after the switch is the first random one. The state is GaLore's. Two
    errors of the published code are not repeated: it drops the rotated moment after one step, and
    computes right projections with the inverse root of a singular matrix.
    """

    in_8_bits: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "auto",
        "switch": 0, "seed": 0, "on_refresh": "published",
    }  # fmt: skip

    on_refresh: ClassVar[tuple[str, ...]] = ("published", *ON_REFRESH)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for key in ("switch", "seed"):
            require_int(key, group[key], 0)

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        decomposed = [p for p in params if not self.draws(self.state[p].get("step", 0), group)]
        super().prepare_sharded_(decomposed, group)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        left, right = self.projections_of(G, state, group)
        # R = Pᵀ G;  N = Adam(R);  W ← W − lr · scale · P N
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        project_back_add_(W, N, left, right, alpha=-step_size * group["scale"])

    def draws(self, step: int, group: dict[str, Any]) -> bool:
        """Whether a projection that is due in a step is drawn at random."""
        return bool(step >= group["switch"])

    def draw(self, G: Tensor, side: int, key: tuple[int, ...], group: dict[str, Any]) -> Tensor:
        """A random projection (side×r) with orthonormal columns, fixed by `key`."""
        return random_orthonormal(G, side, group["rank"], key)

    def _drawn(self, G: Tensor, side: int, key: tuple[int, ...], group: dict[str, Any]) -> Tensor:
        """This rank's rows of a drawn projection; all of an index."""
        P = self.draw(G, side, key, group)
        return P if is_index(P) else self.placement.local_shard(P)

    def projections_of(self, G: Any, state: Any, group: dict[str, Any]) -> tuple[Any, Any]:
        """The projections (L, R) of a matrix in this step, or those of many."""
        if not isinstance(G, Tensor) and not self.draws(state["step"], group):
            refresh_together_(self, group)
        return each(self, self._projections, G, state, group)

    def _projections(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Projections:
        step = state["step"]
        if step % group["update_proj_gap"] == 0 and self.draws(step, group):
            shape = self.placement.global_shape(G)
            keys = [(group["seed"], param_index(self, self.param), step, side) for side in range(2)]
            left, right = (
                self._drawn(G, shape[side], keys[side], group) if projects else None
                for side, projects in enumerate(sides(group["proj_type"], shape))
            )
            replace_projections_(self, state, (left, right), G.dtype, group)
            return gather_projections(load_projections(state), shape, self.placement)
        left, right = get_projections(self, state, G, group)
        return left, right


def random_orthonormal(like: Tensor, side: int, rank: int, key: tuple[int, ...]) -> Tensor:
    """A side×r matrix with orthonormal columns, uniform on the Stiefel manifold, fixed by `key`.

    It is Q of the QR decomposition of a Gaussian matrix, with the signs that make R's diagonal
    positive. Only these signs give a uniform distribution, and they make Q unique, so that devices
    agree to rounding. The Gaussian matrix is drawn on the CPU for the same reason.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    generator = torch.Generator("cpu").manual_seed(seed)
    Z = torch.randn(side, rank, generator=generator, device="cpu").to(like.device)
    Q, R = torch.linalg.qr(Z)
    P: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return P.to(like.dtype).contiguous()
