"""GoLore (2410.11289): GaLore, then random subspaces, with the first moment carried over."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.distributed import REPLICATED, Placement
from lowrank_lab.optim.base import ProjectedAdamW, is_whole, place, refuse
from lowrank_lab.optim.projection import (
    Projections,
    check_projection,
    joined,
    lift_add_,
    projected,
    refresh_parts_,
    refreshed,
    sides,
    store_,
    stored,
    unprojected,
)


class GoLore(ProjectedAdamW):
    """GoLore's AdamW: GaLore whose projection is random from the step `switch` on.

    Keys of a ranked group: `rank`; `update_proj_gap`, steps between two projections (200); `scale`
    (0.25); `proj_type`, std | reverse_std | left | right | full; `refresh`, svd | randomized |
    gram, for the projections before the switch; `switch`, steps of GaLore (0: random from the
    start, what the paper proves to converge; its language models take 80 % of the run); `seed` (0).

    The first projection that is due at or after the switch is the first random one. At every
    refresh, before the switch too, the first moment is carried into the new subspace, and the
    second is kept. State and convention are GaLore's. The published code rotates a copy of the
    moment and drops it after that step, and its random right projections come from the inverse
    root of a singular matrix; both are done by the equations here.
    """

    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "svd",
        "switch": 0, "seed": 0,
    }  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_projection(group)
        for key in ("switch", "seed"):
            refuse(key, group[key], not is_whole(group[key]), "a whole number from 0")

    def cut(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        no_svd = group["refresh"] == "gram" or group["switch"] == 0
        return unprojected(group, shape) if no_svd else None

    def prepare_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        before = [p for p in params if self.state[p].get("step", 0) < group["switch"]]
        refresh_parts_(self, before, group)

    def update_(
        self, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
    ) -> None:
        old = stored(state)
        left, right = self._projections(G, state, group)
        new = stored(state)
        if "exp_avg" in state and any(a is not b for a, b in zip(old, new, strict=True)):
            state["exp_avg"].copy_(carried(state["exp_avg"], old, new, self.placement))
        # R = Pᵀ G;  N = Adam(R);  W ← W − lr · scale · P N
        R = projected(G, left, right, group)
        N = self.adam_direction(R, state, group)
        lift_add_(W, N, left, right, alpha=-step_size * group["scale"])

    def _projections(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Projections:
        """(L, R) for this step: GaLore's before the switch, random orthonormal ones after it."""
        step = state["step"]
        if step % group["update_proj_gap"] == 0 and step >= group["switch"]:
            shape = self.placement.global_shape(G)
            keys = [(group["seed"], place(self, state), step, side) for side in range(2)]
            left, right = (
                self.placement.local_shard(
                    random_orthonormal(G, shape[side], group["rank"], keys[side])
                )
                if projects
                else None
                for side, projects in enumerate(sides(group["proj_type"], shape))
            )
            store_(state, (left, right), G.dtype)
            return joined(stored(state), self.placement)
        return refreshed(self, state, G, group)


def carried(
    m: Tensor, old: Projections, new: Projections, placement: Placement = REPLICATED
) -> Tensor:
    """The moment m of the old subspace in the new one: m ← (LₙᵀLₒ) m (RₒᵀRₙ), r×r products."""
    if new[0] is not None and old[0] is not None:
        m = placement.all_reduce_sum_(new[0].T @ old[0]) @ m
    if new[1] is not None and old[1] is not None:
        m = m @ placement.all_reduce_sum_(old[1].T @ new[1])
    return m


def random_orthonormal(like: Tensor, side: int, rank: int, key: tuple[int, ...]) -> Tensor:
    """A side×r matrix with orthonormal columns, uniform on the Stiefel manifold, fixed by `key`.

    It is the Q of a Gaussian's QR with a positive diagonal of R: uniform only so, and the only one,
    so that devices agree to rounding. Drawn on the CPU for the same reason.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    generator = torch.Generator("cpu").manual_seed(seed)
    Z = torch.randn(side, rank, generator=generator, device="cpu").to(like.device)
    Q, R = torch.linalg.qr(Z)
    P: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return P.to(like.dtype).contiguous()
