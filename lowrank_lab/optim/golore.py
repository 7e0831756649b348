"""GoLore (2410.11289): GaLore, then random subspaces; the first moment follows each change."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require_int
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.eight_bit import moment_like, read_moment
from lowrank_lab.optim.matrix_updates import each
from lowrank_lab.optim.projection import (
    check_projection,
    gather_projections,
    get_projections,
    load_projections,
    project_back_add_,
    projected_gradient,
    projected_shapes,
    refresh_together_,
    store_projections_,
    unprojected_dim,
)
from lowrank_lab.optim.sharded_refresh import refresh_sharded_
from lowrank_lab.optim.subspaces import Projections, sides


class GoLore(ProjectedAdamW):
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

    The first refresh at or after the switch is the first random one. At every refresh, also before
    the switch, the first moment is carried into the new subspace and the second one is kept. The
    state is GaLore's. Two errors of the published code are not repeated: it drops the rotated
    moment after one step, and computes right projections with the inverse root of a singular
    matrix.
    """

    in_8_bits: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "auto",
        "switch": 0, "seed": 0,
    }  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_projection(group)
        for key in ("switch", "seed"):
            require_int(key, group[key], 0)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        return super().state_shapes(group, shape) | projected_shapes(group, shape)

    def can_stack(self, group: dict[str, Any]) -> bool:
        return True

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return unprojected_dim(group, shape)

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        before = [p for p in params if self.state[p].get("step", 0) < group["switch"]]
        refresh_sharded_(self, before, group)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        if not isinstance(G, Tensor) and state["step"] < group["switch"]:
            refresh_together_(self, group)
        left, right = each(self, self._carried, G, state, group)
        # R = Pᵀ G;  N = Adam(R);  W ← W − lr · scale · P N
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        project_back_add_(W, N, left, right, alpha=-step_size * group["scale"])

    def _carried(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Projections:
        """The projections (L, R) of this step; the first moment follows them."""
        old = load_projections(state)
        used = self._projections(G, state, group)
        new = load_projections(state)
        if "exp_avg" in state and any(a is not b for a, b in zip(old, new, strict=True)):
            moment = state["exp_avg"]
            carried = carry_moment(read_moment(moment), old, new, self.placement)
            state["exp_avg"] = moment_like(carried, moment)
        return used

    def _projections(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Projections:
        """The projections (L, R) of this step: GaLore's before the switch, random ones after it."""
        step = state["step"]
        if step % group["update_proj_gap"] == 0 and step >= group["switch"]:
            shape = self.placement.global_shape(G)
            keys = [(group["seed"], param_index(self, self.param), step, side) for side in range(2)]
            left, right = (
                self.placement.local_shard(
                    random_orthonormal(G, shape[side], group["rank"], keys[side])
                )
                if projects
                else None
                for side, projects in enumerate(sides(group["proj_type"], shape))
            )
            store_projections_(state, (left, right), G.dtype)
            return gather_projections(load_projections(state), shape, self.placement)
        left, right = get_projections(self, state, G, group)
        return left, right


def carry_moment(
    m: Tensor, old: Projections, new: Projections, placement: Placement = REPLICATED
) -> Tensor:
    """A moment m of the old subspace in the new one: m ← (Lₙᵀ Lₒ) m (Rₒᵀ Rₙ), with r×r products."""
    if new[0] is not None and old[0] is not None:
        m = placement.all_reduce_sum_(new[0].T @ old[0]).to(m.dtype) @ m
    if new[1] is not None and old[1] is not None:
        m = m @ placement.all_reduce_sum_(old[1].T @ new[1]).to(m.dtype)
    return m


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
