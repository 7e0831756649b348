"""APOLLO (2412.05270): the gradient, rescaled as Adam rescales a random projection of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.channels import rank_channels
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import is_number, require, require_bool, require_choice, require_int
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.fira import EPS, growth_limiter, limited_norm
from lowrank_lab.optim.matrix_updates import SEED_STRIDE, each
from lowrank_lab.optim.projecting import projected_gradient
from lowrank_lab.optim.projection import (
    ONE_SIDED,
    check_projection,
    get_projections,
    projected_shapes,
    refresh_together_,
    unprojected_dim,
)
from lowrank_lab.optim.sharded_refresh import refresh_sharded_
from lowrank_lab.optim.subspaces import Projections, next_seed, sides

PROJECTIONS = ("random", "svd", "subspace", "gram")


class Apollo(ProjectedAdamW):
    """APOLLO's AdamW, a drop-in for `apollo_torch.APOLLOAdamW` with the same random matrices.

    Keys of a ranked group (default):

    * `rank`: r.
    * `update_proj_gap` (200): steps between two projections.
    * `scale` (1): the update is multiplied by √scale. APOLLO-Mini: 128, with rank 1 and
      `scale_type` tensor.
    * `proj` (random): random | svd | subspace | gram; all but the first as `refresh` of GaLore.
    * `proj_type` (std): std | reverse_std | left | right.
    * `scale_type` (channel): channel | tensor.
    * `scale_front` (False): include √scale in the norms that the growth limiter compares.
    * `disable_nl` (False): omit the growth limiter.
    * `store_projection` (True): store a random projection; False stores its seed and draws the
      matrix again at every step.
    * `seed` (0, the package's matrices): of the random projections.

    State of an m×n matrix with b bytes per entry, for `std`: 2·r·max(m, n)·b bytes of moments, 4 of
    the limiter's norm, and r·min(m, n)·b of the projection if it is stored.

    Two differences from the package. Channel norms are taken over the rank axis, for every
    `proj_type`; the package takes the longer side of G, and crashes or scales by the wrong norms
    where that isn't the rank axis. After a gradient of zero, growth isn't limited for one step; the
    package then scales the update by 1e-8 and needs about 1800 steps to recover. `full` is refused:
    it leaves no rank axis.

    Args:
        scale_front, disable_nl: as in the package, defaults for groups without these keys.
        precision: `state_precision` and `stochastic_rounding`, see ProjectedAdamW.
    """

    in_8_bits: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std",
        "scale_type": "channel", "scale_front": False, "disable_nl": False,
        "store_projection": True, "seed": 0,
    }  # fmt: skip

    loads_from: ClassVar[tuple[str, ...]] = (*ProjectedAdamW.loads_from, "apollo_torch")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        **precision: Any,
    ) -> None:
        keys = {"scale_front": scale_front, "disable_nl": disable_nl}
        groups = [keys | g if isinstance(g, dict) and "rank" in g else g for g in params]
        super().__init__(groups, lr, betas, eps, weight_decay, correct_bias, **precision)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_projection(group, ONE_SIDED)
        require_choice("proj", group["proj"], PROJECTIONS)
        require_choice("scale_type", group["scale_type"], ("channel", "tensor"))
        for key in ("scale_front", "disable_nl", "store_projection"):
            require_bool(key, group[key])
        can_redraw = group["proj"] == "random" or group["store_projection"]
        require("store_projection", False, can_redraw, "True: an SVD can't be drawn from a seed")
        scale = group["scale"]
        require("scale", scale, is_number(scale) and 0 <= scale < math.inf, "at least 0")
        require_int("seed", group["seed"], 0)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        shapes = super().state_shapes(group, shape) | projected_shapes(group, shape)
        if "rank" in group:
            shapes |= {} if group["disable_nl"] else {"residual_norm": ()}
            shapes |= {"seed": None} if group["proj"] == "random" else {}
        return shapes

    def can_stack(self, group: dict[str, Any]) -> bool:
        return True

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return unprojected_dim(group, shape)

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if group["proj"] != "random":
            refresh_sharded_(self, params, group | {"refresh": group["proj"]})

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        if not isinstance(G, Tensor) and group["proj"] != "random":
            refresh_together_(self, group | {"refresh": group["proj"]})
        left, right = each(self, self._projections, G, state, group)
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        # φ = ‖N‖ / (‖R‖ + ε), per channel (over the rank axis) or once for the tensor
        whole = group["scale_type"] == "tensor"
        channels = rank_channels(G, right, self.placement, whole=whole)
        before = None if group["disable_nl"] else limited_norm(state, G)
        root, front = math.sqrt(group["scale"]), group["scale_front"]
        phi, norm = _scale_(R, N, G, before, channels, root, front)
        if norm is not None:
            state["residual_norm"] = norm
        # W ← W − lr · √scale · φ∘G
        channels.add_scaled_(W, G, phi, alpha=-step_size)

    def _projections(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Projections:
        """(L, None) or (None, R) of this step; the state's `seed` is that of the current one."""
        if group["proj"] != "random":
            return get_projections(self, state, G, group | {"refresh": group["proj"]})
        due = state["step"] % group["update_proj_gap"] == 0
        if "seed" not in state:
            state["seed"] = (group["seed"] * SEED_STRIDE + param_index(self, self.param)) % 2**63
        elif due:
            state["seed"] = next_seed(state["seed"])
        shape, rank = self.placement.global_shape(G), group["rank"]
        left = sides(group["proj_type"], shape)[0]
        side = shape[0] if left else shape[1]
        name = "projection_left" if left else "projection_right"
        if not group["store_projection"]:
            state.pop(name, None)
            P = random_projection(G, side, rank, left, state["seed"])
        else:
            if due or name not in state:
                P = random_projection(G, side, rank, left, state["seed"])
                state[name] = self.placement.local_shard(P)
            P = self.placement.all_gather(state[name], length=side)
        return (P, None) if left else (None, P)


@Chain
def _scale_(
    R: Any, N: Any, G: Any, before: Tensor | None, channels: Any, root: float, scale_front: bool
) -> tuple[Tensor, Tensor | None]:
    """G ← √scale·φ∘G of stacks; √scale·φ, and the limited norm if there was one before."""
    R_norm, N_norm, G_norm = channels.norms(R, N, G)
    phi = N_norm / (R_norm + EPS)
    norm = None
    if before is not None:
        # S = φ∘G, so that ‖S‖² = Σ φ²‖G‖² over the channels
        S_norm = channels.total(phi * G_norm)
        S_norm = root * S_norm if scale_front else S_norm
        limiter = growth_limiter(S_norm, before)
        phi, norm = channels.divided(phi, limiter, phi.dtype), S_norm / limiter
    phi = root * phi
    channels.scale_(G, phi.to(G.dtype))
    return phi, norm


def random_projection(like: Tensor, side: int, rank: int, left: bool, seed: int) -> Tensor:
    """A Gaussian projection P (side×r) with variance 1/r, so that E[P Pᵀ] is the identity.

    As in the package, it is drawn in float32 on the device of `like`: a CPU and a GPU draw
    different numbers. `left`: for the left side of the gradient (side = m), otherwise for the right
    (n).
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    shape = (side, rank) if left else (rank, side)
    P = torch.randn(shape, generator=generator, device=like.device).div_(math.sqrt(rank))
    return (P if left else P.T).to(like.dtype).contiguous()
