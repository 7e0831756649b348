"""Rows of METHODS with dense weights, and Adam on projected gradients.

`methods.registry` joins the families and says where learning rates come from.
"""

from __future__ import annotations

from lowrank_lab.methods.method import REST_LR, Method
from lowrank_lab.methods.optimizers import (
    projected,
)
from lowrank_lab.methods.options import (
    ByWidth,
    Option,
    adam_options,
    projection_options,
)
from lowrank_lab.optim import Apollo, Fira, Frugal, GaLore, GoLore, LDAdam, frugal
from lowrank_lab.optim.apollo import PROJECTIONS
from lowrank_lab.optim.carried import ON_REFRESH
from lowrank_lab.optim.ldadam import ldadam_states
from lowrank_lab.optim.projection import PROJ_TYPES, REFRESHES
from lowrank_lab.optim.state_bytes import (
    limited_states,
    projected_states,
    stored_projections,
)

ONE_SIDED = ("std", "reverse_std", "left", "right")
_APOLLO = {
    **adam_options(eps=1e-6),
    **projection_options(ONE_SIDED),
    "scale": Option.number(1.0, 0, 1e6),
    "proj": Option.choice("random", PROJECTIONS),
    "scale_type": Option.choice("channel", ("channel", "tensor")),
    "scale_front": Option.flag(False),
    "store_projection": Option.flag(True),
}
_APOLLO_KEYS = tuple(name for name in _APOLLO if name not in ("beta1", "beta2", "eps"))
_SUBSPACE_KEYS = ("update_proj_gap", "proj_type", "refresh", "on_refresh")
_GALORE_LR = ByWidth({48: 1.13e-2, 64: 8.24e-3, 512: 1e-2})
_GALORE_SCALE = ByWidth({96: 1.0, 512: 0.25})

PROJECTED = (
    Method(
        name="galore",
        summary="dense weights, Adam in a rank-r subspace of the gradient, renewed by SVD",
        source="2403.03507",
        year=2024,
        parent="full-rank",
        use="dense weights with small states, for an SVD now and then",
        optimizer=projected(GaLore, *_SUBSPACE_KEYS, "scale", "spread_refresh"),
        lr=_GALORE_LR,
        rest_lr=REST_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-6, beta2=0.95),
            **projection_options(PROJ_TYPES, REFRESHES, spread=True, on_refresh=ON_REFRESH),
            "scale": Option.number(_GALORE_SCALE, 0, 1000),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n)",
        eight_bit=True,
        state_bytes=projected_states,
        projection_bytes=stored_projections,
        colour="#D55E00",
    ),
    Method(
        name="fira",
        summary="GaLore plus the gradient outside the subspace, scaled and growth-limited",
        source="2410.01623",
        year=2024,
        parent="galore",
        use="GaLore's states, with an update of full rank",
        optimizer=projected(Fira, *_SUBSPACE_KEYS, "alpha", "spread_refresh"),
        lr=ByWidth({48: 2.04e-2, 64: 8.37e-3, 512: 1e-2}),
        rest_lr=REST_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-6),
            **projection_options(ONE_SIDED, REFRESHES, spread=True, on_refresh=ON_REFRESH),
            "alpha": Option.number(
                ByWidth({96: 0.5, 512: 0.25, 1024: 0.25, 2048: 0.0625}), 0, 1000
            ),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n) + 1",
        eight_bit=True,
        state_bytes=limited_states,
        projection_bytes=stored_projections,
        colour="#009E73",
    ),
    Method(
        name="apollo",
        summary="the raw gradient, scaled by what Adam does to a random projection of it",
        source="2412.05270",
        year=2024,
        parent="fira",
        use="small states without an SVD",
        optimizer=projected(Apollo, *_APOLLO_KEYS, seeded=True),
        lr=ByWidth({48: 4.42e-2, 64: 2.12e-2, 512: 1e-2}),
        rest_lr=REST_LR,
        uses_rank=True,
        options=_APOLLO,
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n) + 1; without store_projection r·min(m,n) less",
        eight_bit=True,
        state_bytes=limited_states,
        projection_bytes=stored_projections,
        colour="#AA0088",
    ),
    Method(
        name="apollo-mini",
        summary="APOLLO at rank 1, with one scale per matrix",
        source="2412.05270",
        year=2024,
        parent="apollo",
        use="nearly no states: a vector per matrix side",
        optimizer=projected(Apollo, *_APOLLO_KEYS, seeded=True),
        lr=ByWidth({48: 1.64e-2, 512: 1e-2}),
        rest_lr=REST_LR,
        uses_rank=True,
        rank=1,
        options=_APOLLO
        | {
            "scale": Option.number(ByWidth({96: 32.0, 512: 128.0}), 0, 1e6),
            "scale_type": Option.choice("tensor", ("channel", "tensor")),
        },
        needs_full="none",
        states="2·max(m,n) + min(m,n) + 1; without store_projection min(m,n) less",
        eight_bit=True,
        state_bytes=limited_states,
        projection_bytes=stored_projections,
        colour="#BB77FF",
    ),
    Method(
        name="golore",
        summary="GaLore that turns to random subspaces, moments carried, at step `switch`",
        source="2410.11289",
        year=2024,
        parent="galore",
        use="GaLore when gradients are mostly noise, late in training",
        optimizer=projected(GoLore, *_SUBSPACE_KEYS, "scale", "switch", seeded=True),
        lr=_GALORE_LR,
        rest_lr=REST_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-6, beta2=0.99),
            **projection_options(PROJ_TYPES, REFRESHES, on_refresh=GoLore.on_refresh),
            "scale": Option.number(_GALORE_SCALE, 0, 1000),
            "switch": Option.integer(0, 0),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n)",
        eight_bit=True,
        state_bytes=projected_states,
        projection_bytes=stored_projections,
        colour="#AA0044",
    ),
    Method(
        name="frugal",
        summary="Adam in a subspace of the gradient, restarted with it, and the sign of the rest",
        source="2411.07837",
        year=2024,
        parent="galore",
        use="GaLore's states, with signs outside of the subspace",
        optimizer=projected(Frugal, *_SUBSPACE_KEYS, "proj", "inactive_lr_scale", seeded=True),
        lr=ByWidth({48: 4.72e-3, 64: 2.36e-3, 512: 1e-3}),
        rest_lr=REST_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-8),
            **projection_options(ONE_SIDED, REFRESHES, on_refresh=("reset", "keep", "transport")),
            "proj": Option.choice("svd", frugal.PROJECTIONS),
            "inactive_lr_scale": Option.number(1.0, 0, 1e6),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n); with columns r in place of r·min(m,n)",
        state_bytes=frugal.frugal_states,
        projection_bytes=frugal.frugal_projections,
        colour="#445500",
    ),
    Method(
        name="ldadam",
        summary="Adam in a subspace that follows the gradient in every step, with error feedback",
        source="2410.16103",
        year=2024,
        parent="galore",
        use="no period to tune; GaLore's states without feedback",
        optimizer=projected(LDAdam, "rho", "proj_type", "error_feedback", "refresh"),
        lr=ByWidth({48: 7.77e-3, 64: 2.98e-3, 512: 1e-3, 1024: 1e-3, 2048: 5e-4}),
        rest_lr=REST_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-8),
            "beta1": Option.number(0.908, 0, 0.999999),
            "beta2": Option.number(0.99, 1e-6, 0.999999),
            "rho": Option.number(ByWidth({96: 0.8, 512: 0.908}), 0, 0.999999),
            "proj_type": Option.choice("std", ONE_SIDED),
            "error_feedback": Option.flag(True),
            "refresh": Option.choice("auto", REFRESHES),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n) + mn; without error_feedback mn less",
        state_bytes=ldadam_states,
        projection_bytes=stored_projections,
        colour="#0000FF",
    ),
)
