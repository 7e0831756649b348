"""Fira (2410.01623): GaLore plus the scaled gradient outside the subspace, limited in growth."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.channels import rank_channels
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require_bool
from lowrank_lab.optim.projecting import project_back_add_, projected_gradient
from lowrank_lab.optim.projection import (
    ONE_SIDED,
    get_projections,
)
from lowrank_lab.optim.stacks import Matrices, tensors_of
from lowrank_lab.optim.subspace_adamw import SubspaceAdamW

NORM_GROWTH_LIMIT = 1.01  # γ
EPS = 1e-8


class Fira(SubspaceAdamW):
    """Fira's AdamW, a drop-in for `fira.FiraAdamW`.

    Keys of a ranked group (default):

    * `rank`: r.
    * `update_proj_gap` (200): steps between two projections.
    * `alpha` (1): factor of the back-projection.
    * `proj_type` (std): std | reverse_std | left | right.
    * `refresh` (auto): svd, exact and equal to the package | subspace (`iterated_subspaces`) |
      randomized | gram, exact with other rounding | auto: subspace on a GPU, svd elsewhere.
    * `spread_refresh` (False, as in the package): each matrix is refreshed at another step of the
      gap.
    * `on_refresh` (keep, as in the package): keep | reset | transport, what a refresh does to
      Adam's moments (`SubspaceAdamW`). A reset restarts the growth limiter, too.
    * `forgive_zero` (True): after a residual of zero, growth isn't limited for one step. False is
      the published rule: after one gradient that is zero, or inside the subspace, the residual is
      limited to 1e-8, and needs about 1800 steps to grow back.

    As in the package, alpha scales both back-projections: with alpha ≠ 1 the residual is G −
    alpha·P R. `full` is refused: with both sides projected, a channel has no rank axis along which
    to take its norm.
    """

    in_8_bits: ClassVar[bool] = True
    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "alpha": 1.0, "proj_type": "std", "refresh": "auto",
        "spread_refresh": False, "forgive_zero": True, "on_refresh": "keep",
    }  # fmt: skip

    loads_from: ClassVar[tuple[str, ...]] = (*SubspaceAdamW.loads_from, "fira")

    proj_types: ClassVar[tuple[str, ...]] = ONE_SIDED

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        require_bool("forgive_zero", group["forgive_zero"])

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        norm: Shapes = {"residual_norm": ()} if "rank" in group else {}
        return super().state_shapes(group, shape) | norm

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        left, right = get_projections(self, state, G, group)
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        # S = (G − αP R)∘φ, limited;  W ← W − lr · (αP N + S) = W − lr · (αP (N − R∘φ) + G∘φ)
        alpha, channels = group["alpha"], rank_channels(G, right, self.placement)
        before, forgives = limited_norm(state, G), group["forgive_zero"]
        N, phi, norm = _scale_residual_(R, N, G, before, channels, alpha, forgives)
        state["residual_norm"] = norm
        project_back_add_(W, N, left, right, alpha=-step_size * alpha)
        channels.add_scaled_(W, G, phi, alpha=-step_size)


@Chain
def _scale_residual_(
    R: Any, N: Any, G: Any, before: Tensor, channels: Any, alpha: float, forgive_zero: bool
) -> tuple[Any, Tensor, Tensor]:
    """N ← N − R∘φ, and G ← G∘φ of stacks, with φ = ‖N‖ / (‖R‖ + ε) per channel, limited.

    Returns N, φ and the limited norm of the residual.
    """
    R_norm, N_norm, G_norm = channels.norms(R, N, G)
    phi = N_norm / (R_norm + EPS)
    # P has orthonormal columns: ‖G − αP R‖² = ‖G‖² − (2α − α²)‖R‖² per channel. A difference at
    # rounding level means that the gradient lies inside the subspace: the residual is zero.
    rounding = max(8 * torch.finfo(G_norm.dtype).eps, torch.finfo(G.dtype).eps)
    G_norm_sq = G_norm.square()
    residual_sq = torch.addcmul(G_norm_sq, R_norm, R_norm, value=alpha**2 - 2 * alpha)
    residual_sq *= residual_sq > rounding * G_norm_sq
    S_norm = channels.total(residual_sq.sqrt_().mul_(phi))
    limiter = growth_limiter(S_norm, before, forgive_zero)
    phi = channels.divided(phi, limiter, N.dtype)
    channels.subtract_scaled_(N, R, phi)
    channels.scale_(G, phi.to(G.dtype))
    return N, phi, S_norm / limiter


def limited_norm(state: Any, G: Matrices) -> Tensor:
    """‖S_prev‖, the limited norm of the previous step; ∞ at first, which limits nothing.

    Of stacks, a vector. It is `residual_norm` in the state.
    """
    if "residual_norm" in state:
        found: Tensor = state["residual_norm"]
        return found
    shape = () if isinstance(G, Tensor) else (len(G.tensors),)
    wide = torch.promote_types(G.dtype, torch.float32)
    return torch.full(shape, math.inf, dtype=wide, device=tensors_of(G)[0].device)


def growth_limiter(norm: Tensor, previous: Tensor, forgive_zero: bool = True) -> Tensor:
    """Fira's norm-growth limiter, max(‖S‖ / (‖S_prev‖ + ε), γ) / γ; 1 after a norm of ∞.

    Args:
        norm: ‖S‖ (0-dimensional), or that of each parameter (a vector).
        previous: ‖S_prev‖, the limited norm of the previous step.
        forgive_zero: no limit after a norm up to ε; False is the published rule (see Fira).
    """
    if forgive_zero:
        previous = F.threshold(previous, EPS, math.inf)
    return (norm / (previous + EPS)).clamp(min=NORM_GROWTH_LIMIT) / NORM_GROWTH_LIMIT
