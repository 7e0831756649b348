"""APOLLO (2412.05270): the raw gradient, scaled by what Adam does to a random projection of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.optim.base import (
    ProjectedAdamW,
    is_number,
    is_whole,
    place,
    refuse,
)
from lowrank_lab.optim.fira import EPS, growth_limiter
from lowrank_lab.optim.projection import (
    channel_norms,
    check_projection,
    projected,
    refresh_parts_,
    refreshed,
    sides,
    unprojected,
)

PROJECTIONS = ("random", "svd", "gram")
SEED_STRIDE = 1_000_003  # keeps the parameters of two seeds apart


class Apollo(ProjectedAdamW):
    """APOLLO's AdamW, a drop-in for `apollo_torch.APOLLOAdamW`, its random matrices included.

    Keys of a ranked group: `rank`; `update_proj_gap`, steps between two projections (200); `scale`,
    whose root multiplies the update (1; APOLLO-Mini: 128 with rank 1 and scale_type tensor);
    `proj`, random | svd | gram (an SVD's, see `gram_subspaces`); `proj_type`, std | reverse_std |
    left | right; `scale_type`, channel | tensor; `scale_front`, whether the norms that the growth
    limiter compares include the scale (False); `disable_nl`, True leaves the limiter out (False);
    `store_projection`, False keeps a random projection's seed instead of its matrix and draws it
    anew at every step (True); `seed` (0, the package's matrices).

    State of an m×n matrix of b bytes an element, for `std`: 2·r·max(m, n)·b for the moments, 4 for
    the limiter's norm, and r·min(m, n)·b for the projection, nothing if it isn't stored.

    A channel's norms run over the rank axis, whichever side is projected; the package takes the
    longer side of G for that and crashes or scales by the wrong norms where it isn't. After a
    gradient of zero, growth isn't limited for one step: the package then shrinks the update to
    1e-8, for some 1800 steps. `full` is refused: it leaves no rank axis.

    Args:
        scale_front, disable_nl: as in the package, for all groups that don't have these keys.
        precision: `state_precision` and `stochastic_rounding`, see ProjectedAdamW.
    """

    group_defaults: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std",
        "scale_type": "channel", "scale_front": False, "disable_nl": False,
        "store_projection": True, "seed": 0,
    }  # fmt: skip

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
        one_sided = ("std", "reverse_std", "left", "right")
        check_projection(group, allowed=one_sided)
        for key, allowed in (("proj", PROJECTIONS), ("scale_type", ("channel", "tensor"))):
            refuse(key, group[key], group[key] not in allowed, f"one of {', '.join(allowed)}")
        for key in ("scale_front", "disable_nl", "store_projection"):
            refuse(key, group[key], not isinstance(group[key], bool), "True or False")
        unseeded = group["proj"] != "random" and not group["store_projection"]
        refuse(
            "store_projection", False, unseeded, "True: an SVD has no seed to draw it from again"
        )
        scale, seed = group["scale"], group["seed"]
        refuse("scale", scale, not (is_number(scale) and 0 <= scale < math.inf), "at least 0")
        refuse("seed", seed, not is_whole(seed), "a whole number from 0")

    def cut(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return None if group["proj"] == "svd" else unprojected(group, shape)

    def prepare_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if group["proj"] == "gram":
            refresh_parts_(self, params, group)

    def update_(
        self, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
    ) -> None:
        left, right = self._projections(G, state, group)
        R = projected(G, left, right, group)
        N = self.adam_direction(R, state, group)
        # φ = ‖N‖ / (‖R‖ + ε), per channel (over the rank axis) or once for the tensor
        axis = None if group["scale_type"] == "tensor" else 0 if right is None else 1
        norms = [channel_norms(X, axis) for X in (R, N, G)]
        R_norm, N_norm, G_norm = (
            norms if axis is not None else self.placement.global_norm(torch.stack(norms))
        )
        phi, root = N_norm / (R_norm + EPS), math.sqrt(group["scale"])
        # S = φ∘G, whose norm follows from G's: ‖S‖² = Σ φ²‖G‖² over the channels
        if not group["disable_nl"]:
            S_norm = torch.linalg.vector_norm(phi * G_norm)
            S_norm = self.placement.global_norm(S_norm) if axis is not None else S_norm
            phi = phi / growth_limiter(
                state, root * S_norm if group["scale_front"] else S_norm, forgive_zero=True
            )
        # W ← W − lr · √scale · φ∘G
        W.addcmul_(G, (root * phi).to(G.dtype), value=-step_size)

    def _projections(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(L, None) or (None, R) for this step; `seed` in the state is the current one's."""
        if group["proj"] != "random":
            return refreshed(self, state, G, group | {"refresh": group["proj"]})
        due = state["step"] % group["update_proj_gap"] == 0
        if "seed" not in state:
            state["seed"] = (group["seed"] * SEED_STRIDE + place(self, state)) % 2**63
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
            P = self.placement.all_gather(state[name])
        return (P, None) if left else (None, P)


def random_projection(like: Tensor, side: int, rank: int, left: bool, seed: int) -> Tensor:
    """A side×r Gaussian/√r matrix for the left (m×r) or the right side (n×r) of a gradient.

    Drawn on the device of `like` in float32 as the package draws it, so that the numbers of a CPU
    and those of a GPU differ. E[P Pᵀ] is the identity.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    shape = (side, rank) if left else (rank, side)
    P = torch.randn(shape, generator=generator, device=like.device).div_(math.sqrt(rank))
    return (P if left else P.T).to(like.dtype).contiguous()


def next_seed(seed: int) -> int:
    """The seed of the projection after that of `seed`: the package's sequence.

    It is the last of 15 draws below 2⁶³ − 1 from torch's CPU generator, a Mersenne Twister of which
    numpy has one too. Without tensors it also works where these have no values (fake tensors).
    """
    words = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=30, dtype=np.uint32)
    return (int(words[-2]) << 32 | int(words[-1])) % (2**63 - 1)
