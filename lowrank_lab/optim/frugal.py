"""FRUGAL (2411.07837): Adam in a subspace of the gradient, and the sign of the rest.

Shapes in this file: G and W are m×n; P is m×r or n×r; R and N are r×n or m×r.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.distributed.dtensors import full_tensor
from lowrank_lab.optim.adam import state_dtype, to_state_precision
from lowrank_lab.optim.carried import ON_REFRESH
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import is_number, require, require_choice, require_int
from lowrank_lab.optim.columns import (
    INDEX_BYTES,
    index_of,
    put_stacks_,
    select_stacks,
    selected,
)
from lowrank_lab.optim.golore import GoLore
from lowrank_lab.optim.projecting import project_back_add_, projected_gradient
from lowrank_lab.optim.projection import (
    ONE_SIDED,
)
from lowrank_lab.optim.stacks import Stacks, Weights
from lowrank_lab.optim.state_bytes import Weight, projected_states, stored_projections
from lowrank_lab.optim.subspace_adamw import SubspaceAdamW
from lowrank_lab.optim.subspaces import sides

PROJECTIONS = ("svd", "columns", "random")
SIDES = ("projection_left", "projection_right")


class Frugal(GoLore):
    """FRUGAL's AdamW: Adam on the projected gradient, signSGD on the rest of it.

    Keys of a ranked group (default):

    * `rank`: r; or, in its place, `density`: r is this share of each matrix's projected side,
      rounded. The paper's density is 0.25.
    * `update_proj_gap` (200): steps between two projections.
    * `proj` (svd): svd, of the gradient | columns, r columns or rows at random, stored as their
      numbers | random, orthonormal and uniform.
    * `proj_type` (std): std | reverse_std | left | right. `right` with `columns` takes columns of
      every matrix.
    * `inactive_lr_scale` (1): factor of the learning rate of the sign.
    * `on_refresh` (reset, as published): keep | reset | transport, as in GaLore.
    * `refresh` (auto): how `svd` is computed; auto | svd | subspace | randomized | gram, as in
      GaLore.
    * `seed` (0): of `columns` and `random`.

    In all groups ε is added *after* the bias correction, and weight decay precedes the update.

    DTensors are updated in shards, as in GaLore: P is gathered at each step, and a refresh by `svd`
    gathers the gradient or a Gram matrix. `columns` and `random` are drawn on every rank; the
    numbers of columns stay on all of them, and nothing travels.

    State of an m×n matrix with b bytes per entry, for `std`: 2·r·max(m, n)·b bytes of moments and
    r·min(m, n)·b of the projection, 8·r for `columns`.

    Source: 2411.07837, algorithm 1, and its published code.
    """

    in_8_bits: ClassVar[bool] = False
    eps_after: ClassVar[bool] = True
    decays_first: ClassVar[bool] = True
    proj_types: ClassVar[tuple[str, ...]] = ONE_SIDED
    on_refresh: ClassVar[tuple[str, ...]] = ON_REFRESH
    group_defaults: ClassVar[dict[str, Any]] = {
        "density": None, "update_proj_gap": 200, "proj": "svd", "proj_type": "std",
        "inactive_lr_scale": 1.0, "on_refresh": "reset", "refresh": "auto", "seed": 0,
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("density") is not None:
            param_group.setdefault("rank", None)
        super().add_param_group(param_group)

    def check_group(self, group: dict[str, Any]) -> None:
        density, rank, scale = group["density"], group["rank"], group["inactive_lr_scale"]
        if density is not None:
            require("rank", rank, rank is None, "None with a density")
            fits = is_number(density) and 0 < density <= 1
            require("density", density, fits, "in (0, 1], or None with a rank")
            shapes = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            require("density", density, not shapes, f"only for matrices, not {shapes[:1]}")
        for params, same in _by_rank(group["params"], group):
            SubspaceAdamW.check_group(self, same | {"params": params})
        require_choice("proj", group["proj"], PROJECTIONS)
        fits = is_number(scale) and 0 <= scale < float("inf")
        require("inactive_lr_scale", scale, fits, "at least 0")
        require_int("seed", group["seed"], 0)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        group = with_rank(group, shape)
        shapes = super().state_shapes(group, shape)
        if group.get("proj") == "columns" and "rank" in group:
            shapes |= {name: (group["rank"],) for name in SIDES if name in shapes}
        return shapes

    def upgraded(self, group: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        """Numbers of columns, of which earlier versions saved the projection."""
        if group.get("proj") != "columns":
            return entries
        old = {name: P for name in SIDES if (P := entries.get(name)) is not None and P.ndim == 2}
        return entries | {name: index_of(full_tensor(P)) for name, P in old.items()}

    def work(self) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        for params, group in super().work():
            yield from _by_rank(params, group)

    def draws(self, step: int, group: dict[str, Any]) -> bool:
        return bool(group["proj"] != "svd")

    def draw(self, G: Tensor, side: int, key: tuple[int, ...], group: dict[str, Any]) -> Tensor:
        if group["proj"] == "random":
            return super().draw(G, side, key, group)
        chosen = np.random.default_rng(key).permutation(side)[: group["rank"]]
        return torch.from_numpy(chosen).to(G.device, torch.int64)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        left, right = self.projections_of(G, state, group)
        if group["proj"] == "columns":
            self._update_columns_(W, G, state, (left, right), group, step_size)
            return
        # R = PᵀG;  N = Adam(R);  W ← W − lr · (P N + scale · sign(G − P R))
        R = projected_gradient(G, left, right, group)
        N = self.adam_direction(R, state, group)
        rate = float(group["lr"]) * group["inactive_lr_scale"]
        if group["inactive_lr_scale"] > 0:
            self._add_sign_(W, G, R, (left, right), -rate)
        project_back_add_(W, N, left, right, alpha=-step_size)

    def _update_columns_(
        self, W: Any, G: Any, state: Any, P: tuple[Any, Any], group: dict[str, Any], step: float
    ) -> None:
        """As `update_`: P R has the chosen entries of G, of which nothing is left."""
        rate = float(group["lr"]) * group["inactive_lr_scale"]
        if isinstance(W, Weights):
            pairs = [(R if L is None else L, int(L is None)) for L, R in zip(*P, strict=True)]
            indices, dims = [index for index, _ in pairs], [dim for _, dim in pairs]
            R: Any = select_stacks(G, indices, dims, state_dtype(G.dtype, group))
            N = self.adam_direction(R, state, group)
            W.factor = -(rate or step)
            if rate:
                G.flat.sign_()
            else:
                G.flat.zero_()
            N.flat.mul_(-step / W.factor)
            put_stacks_(G, Stacks(N.shapes, N.flat.to(G.dtype)), indices, dims)
            return
        index, dim = (P[1], 1) if P[0] is None else (P[0], 0)
        R = to_state_precision(selected(G, index, dim), group)
        N = self.adam_direction(R, state, group)
        if rate:
            rest = self.buffer("rest", G.shape, G).copy_(G)
            W.add_(rest.index_fill_(dim, index, 0).sign_(), alpha=-rate)
        W.index_add_(dim, index, N.to(W.dtype), alpha=-step)

    def _add_sign_(self, W: Any, G: Any, R: Any, P: tuple[Any, Any], alpha: float) -> None:
        """W ← W + alpha · sign(G − P R)."""
        if isinstance(W, Weights):
            for rest, r, L, Q in zip(G.blocks, R.blocks, *P, strict=True):
                project_back_add_(rest, r, L, Q, alpha=-1.0)
            G.flat.sign_()
            W.factor = alpha  # of G's buffer
            return
        rest = self.buffer("rest", G.shape, G).copy_(G)
        W.add_(project_back_add_(rest, R, *P, alpha=-1.0).sign_(), alpha=alpha)


def frugal_states(w: Weight, config: ResolvedConfig) -> int:
    """`projected_states`, with numbers of columns in the place of their projection."""
    fewer = stored_projections(w, config) - frugal_projections(w, config)
    return projected_states(w, config) - fewer


def frugal_projections(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of a stored projection: of its entries, or of the numbers of columns."""
    if w.target and config.method_options["proj"] == "columns":
        return INDEX_BYTES * config.method_rank
    return stored_projections(w, config)


def with_rank(group: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """A group with the rank of an m×n matrix, where it has a density."""
    if group.get("density") is None:
        return group
    side = shape[0] if sides(group["proj_type"], shape)[0] else shape[1]
    return group | {"rank": max(1, round(group["density"] * side))}


def _by_rank(
    params: list[Tensor], group: dict[str, Any]
) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """The parameters of a group by their ranks; all of them, if it has no density."""
    if group.get("density") is None:
        yield params, group
        return
    known: dict[int, list[Tensor]] = {}
    for p in params:
        known.setdefault(with_rank(group, tuple(p.shape))["rank"], []).append(p)
    for rank, same in known.items():
        yield same, group | {"rank": rank}
