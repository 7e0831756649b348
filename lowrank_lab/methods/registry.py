"""METHODS: one row per method, the only home of its facts and defaults.

Learning rates and scales at width 64 are the best of the study at rank 16 and 20 tokens per
parameter (data/study/README.md: stage 2 of tuning); those at width 96 the best of its larger model
(GoLore has GaLore's). From width 512 on they are those of notebooks/studies/paper_*.yaml, which
name the script or guess behind each; other methods scale their learning rate with width as full
rank does. Over ranks (data/study/ranks and ranks_rates) the best rate is the same up to a quarter
of the width, and half of it at half the width.

Not tuned yet: CoLA below width 512, from which on its rates are those of its authors' scripts.

Colours are Okabe and Ito's, which colour-blind readers can tell apart and which survive print, and
those that Tol calls muted.
"""

from __future__ import annotations

from lowrank_lab.methods.method import Method
from lowrank_lab.methods.optimizers import (
    adamw,
    adamw_8bit,
    loro,
    muon,
    muon_states,
    projected,
    uniform,
)
from lowrank_lab.methods.options import (
    ByWidth,
    FlagByWidth,
    Option,
    adam_options,
    projection_options,
)
from lowrank_lab.optim import Apollo, Fira, GaLore, GoLore, Spam, StableSpam
from lowrank_lab.optim.apollo import PROJECTIONS
from lowrank_lab.optim.projection import PROJ_TYPES, REFRESHES
from lowrank_lab.optim.spam import spam_states
from lowrank_lab.optim.stable_spam import stable_spam_states
from lowrank_lab.optim.state_bytes import (
    adamw_8bit_states,
    adamw_states,
    limited_states,
    projected_states,
    stored_projections,
    two_moments,
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
_LORA = {**adam_options(eps=1e-8), "alpha": Option.number(32.0, 1e-6, 1e6)}
_GALORE_LR = ByWidth({64: 1e-2, 96: 5e-3, 512: 1e-2})
_GALORE_SCALE = ByWidth({64: 1.0, 96: 1.0, 512: 0.25})
_DENSE_LR = ByWidth({64: 5e-3, 96: 5e-3, 512: 1e-3, 1024: 1e-3, 2048: 5e-4})
_SPECTRAL_LR = ByWidth({64: 1e-2, 96: 5e-3, 512: 2e-3, 1024: 2e-3, 2048: 1e-3})

ROWS = (
    Method(
        name="full-rank",
        summary="dense weights, AdamW: what all others are measured against",
        source="1711.05101",
        year=2017,
        use="the baseline: when memory is no limit",
        optimizer=adamw,
        lr=_DENSE_LR,
        options=adam_options(eps=1e-8),
        needs_full="none",
        states="2mn",
        state_bytes=adamw_states,
        colour="#000000",
    ),
    Method(
        name="low-rank",
        summary="W = (α/r)·B·A from scratch, AdamW on the factors",
        source="2505.22922",
        year=2022,  # 2209.13569: the same layer
        parent="full-rank",
        use="when the weights themselves must be small",
        optimizer=adamw,
        lr=ByWidth({64: 2.5e-3, 512: 1.5e-3, 768: 1.5e-3, 1024: 1e-3}),
        spectral_lr=_SPECTRAL_LR,
        layers="low-rank",
        halve_lr_at_high_rank=True,
        uses_rank=True,
        init="kaiming",
        options={**adam_options(eps=1e-8), "alpha": Option.number(None, 1e-6, 1e6)},
        layer_options=("alpha",),
        needs_full="none",
        states="2r(m+n)",
        eight_bit=True,
        state_bytes=adamw_states,
        colour="#0072B2",
    ),
    Method(
        name="lora",
        summary="W = W₀ + (α/r)·B·A with W₀ frozen at its random start",
        source="2106.09685",
        year=2021,
        parent="full-rank",
        use="to fine-tune; in pretraining a control for ReLoRA",
        optimizer=adamw,
        lr=ByWidth({64: 5e-3, 512: 1e-3}),
        layers="lora",
        uses_rank=True,
        init="kaiming",
        options=_LORA,
        layer_options=("alpha",),
        needs_full="none",
        states="2r(m+n)",
        eight_bit=True,
        state_bytes=adamw_states,
        colour="#CC79A7",
    ),
    Method(
        name="relora",
        summary="LoRA whose factors are merged into W₀ and drawn anew every merge_every steps",
        source="2307.05695",
        year=2023,
        parent="lora",
        use="updates of high rank with the optimizer states of LoRA",
        optimizer=adamw,
        lr=ByWidth({64: 1e-2, 512: 1e-3}),
        layers="lora",
        uses_rank=True,
        init="kaiming",
        options={
            **_LORA,
            "alpha": Option.number(ByWidth({64: 8.0, 512: 32.0}), 1e-6, 1e6),
            "merge_every": Option.integer(200, 1),
            "merge_moments": Option.choice("scale", ("scale", "magnitude", "random")),
            "merge_share": Option.number(1.0, 0, 1),
            "warm_start": Option.integer(0, 0),
        },
        layer_options=("alpha",),
        needs_full="none",
        states="2r(m+n)",
        eight_bit=True,
        state_bytes=adamw_states,
        colour="#56B4E9",
    ),
    Method(
        name="sltrain",
        summary="W = (α/r)·B·A + S, with S sparse on a fixed random support",
        source="2406.02214",
        year=2024,
        parent="low-rank",
        use="low-rank with a sparse part for what rank r misses",
        optimizer=adamw,
        lr=ByWidth({64: 1e-2, 512: 3e-3}),
        layers="sltrain",
        uses_rank=True,
        init="kaiming",
        options={
            **_LORA,
            "alpha": Option.number(
                ByWidth({64: 8.0, 512: 32.0, 768: 16.0, 1024: 16.0, 2048: 8.0}), 1e-6, 1e6
            ),
            "sparsity": Option.number(0.03, 0, 1),
            "keep_weight": Option.flag(False),
        },
        layer_options=("alpha", "sparsity", "keep_weight"),
        needs_full="none",
        states="2(r(m+n) + ⌊δmn⌋)",
        eight_bit=True,
        state_bytes=adamw_states,
        colour="#7F7F7F",
    ),
    Method(
        name="cola",
        summary="y = B·silu(A·x): factors with an activation between them, AdamW on both",
        source="2502.10940",
        year=2025,
        parent="low-rank",
        use="small weights and activations; no export as a LLaMA",
        optimizer=adamw,
        lr=ByWidth({512: 6e-3, 768: 3e-3, 1024: 3e-3, 2048: 2e-3, 4096: 1e-3}),
        layers="cola",
        uses_rank=True,
        options={
            **adam_options(eps=1e-8),
            "only_lr_act": Option.flag(FlagByWidth({1: False, 1024: True})),
            "recompute": Option.flag(False),
        },
        needs_full="none",
        states="2r(m+n)",
        eight_bit=True,
        state_bytes=adamw_states,
        colour="#661100",
    ),
    Method(
        name="loro",
        summary="low-rank factors with exact Riemannian steps every update_k steps",
        source="LORO (ICLR 2025)",
        year=2025,
        parent="low-rank",
        use="steps that don't depend on the factors' balance",
        optimizer=loro,
        lr=ByWidth({64: 4e-2, 512: 1e-2, 1024: 1e-2, 2048: 5e-3}),
        layers="low-rank",
        uses_rank=True,
        init="kaiming",
        options={
            **adam_options(eps=1e-8),
            "alpha": Option.number(None, 1e-6, 1e6),
            "update_k": Option.integer(500, 1),
        },
        layer_options=("alpha",),
        per_layer=False,
        needs_full="none",
        states="2r(m+n)",
        state_bytes=two_moments,
        colour="#332288",
    ),
    Method(
        name="galore",
        summary="dense weights, Adam in a rank-r subspace of the gradient, renewed by SVD",
        source="2403.03507",
        year=2024,
        parent="full-rank",
        use="dense weights with small states, for an SVD now and then",
        optimizer=projected(
            GaLore, "update_proj_gap", "scale", "proj_type", "refresh", "spread_refresh"
        ),
        lr=_GALORE_LR,
        halve_lr_at_high_rank=True,
        uses_rank=True,
        options={
            **adam_options(eps=1e-6),
            **projection_options(PROJ_TYPES, REFRESHES, spread=True),
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
        optimizer=projected(
            Fira, "update_proj_gap", "alpha", "proj_type", "refresh", "spread_refresh"
        ),
        lr=ByWidth({64: 1e-2}),
        uses_rank=True,
        options={
            **adam_options(eps=1e-6),
            **projection_options(ONE_SIDED, REFRESHES, spread=True),
            "alpha": Option.number(
                ByWidth({64: 0.5, 96: 0.5, 512: 0.25, 1024: 0.25, 2048: 0.0625}), 0, 1000
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
        lr=ByWidth({64: 4e-2, 512: 1e-2}),
        uses_rank=True,
        options=_APOLLO,
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n) + 1; without store_projection r·min(m,n) less",
        eight_bit=True,
        state_bytes=limited_states,
        projection_bytes=stored_projections,
        colour="#882255",
    ),
    Method(
        name="apollo-mini",
        summary="APOLLO at rank 1, with one scale per matrix",
        source="2412.05270",
        year=2024,
        parent="apollo",
        use="nearly no states: a vector per matrix side",
        optimizer=projected(Apollo, *_APOLLO_KEYS, seeded=True),
        lr=ByWidth({64: 2e-2, 512: 1e-2}),
        uses_rank=True,
        rank=1,
        options=_APOLLO
        | {
            "scale": Option.number(ByWidth({64: 32.0, 512: 128.0}), 0, 1e6),
            "scale_type": Option.choice("tensor", ("channel", "tensor")),
        },
        needs_full="none",
        states="2·max(m,n) + min(m,n) + 1; without store_projection min(m,n) less",
        eight_bit=True,
        state_bytes=limited_states,
        projection_bytes=stored_projections,
        colour="#AA4499",
    ),
    Method(
        name="golore",
        summary="GaLore that turns to random subspaces, moments carried, at step `switch`",
        source="2410.11289",
        year=2024,
        parent="galore",
        use="GaLore when gradients are mostly noise, as late in training",
        optimizer=projected(
            GoLore, "update_proj_gap", "scale", "proj_type", "refresh", "switch", seeded=True
        ),
        lr=_GALORE_LR,
        uses_rank=True,
        options={
            **adam_options(eps=1e-6),
            **projection_options(PROJ_TYPES, REFRESHES),
            "scale": Option.number(_GALORE_SCALE, 0, 1000),
            "switch": Option.integer(0, 0),
        },
        needs_full="none",
        states="2r·max(m,n) + r·min(m,n)",
        eight_bit=True,
        state_bytes=projected_states,
        projection_bytes=stored_projections,
        colour="#CC6677",
    ),
    Method(
        name="spam",
        summary="Adam with clipped gradient spikes and moments that restart",
        source="2501.06842",
        year=2025,
        parent="full-rank",
        use="when spikes of the gradient spoil a run of Adam",
        optimizer=uniform(
            Spam, "threshold", "update_proj_gap", "warmup", "grad_accu_steps", "density"
        ),
        lr=ByWidth({64: 2.5e-3, 512: 1e-3, 768: 8e-4, 1024: 4e-4}),
        options={
            **adam_options(eps=1e-6),
            "threshold": Option.number(5000.0, 1e-6, 1e12),
            "update_proj_gap": Option.integer(500, 1),
            "warmup": Option.integer(150, 1),
            "grad_accu_steps": Option.integer(20, 0),
            "density": Option.number(1.0, 1e-6, 1),
        },
        needs_full="none",
        states="2mn; with density d < 1 about 2dmn and a mask",
        state_bytes=spam_states,
        colour="#44AA99",
    ),
    Method(
        name="stable-spam",
        summary="Adam on gradients clipped by their running maximum and norm",
        source="2502.17055",
        year=2025,
        parent="spam",
        use="the same, in low precision or at high learning rates",
        optimizer=uniform(StableSpam, "gamma1", "gamma2", "theta", "update_proj_gap"),
        lr=ByWidth({64: 5e-3, 512: 1e-3, 768: 8e-4, 1024: 4e-4}),
        options={
            **adam_options(eps=1e-8),
            "gamma1": Option.number(0.7, 0, 0.999999),
            "gamma2": Option.number(0.9, 0, 0.999999),
            "theta": Option.number(0.999, 0, 0.999999),
            "update_proj_gap": Option.integer(1000, 1),
        },
        needs_full="none",
        states="2mn + 3",
        state_bytes=stable_spam_states,
        colour="#117733",
    ),
    Method(
        name="adamw-8bit",
        summary="dense weights, AdamW with moments of 8 bits (torchao)",
        source="2110.02861",
        year=2021,
        parent="full-rank",
        use="a quarter of AdamW's states, no other hyperparameter",
        optimizer=adamw_8bit,
        lr=_DENSE_LR,
        options=adam_options(eps=1e-8),
        states="2mn of 1 byte; a scale per block",
        state_bytes=adamw_8bit_states,
        fake_steps=False,
        colour="#999933",
    ),
    Method(
        name="muon",
        summary="orthogonalised momentum for the matrices, AdamW for the rest (torch)",
        source="Muon (K. Jordan 2024)",
        year=2024,
        use="half of AdamW's states where each matrix fits on one device",
        optimizer=muon,
        lr=ByWidth({64: 1e-2, 512: 2e-3, 2048: 1e-3}),
        options={
            **adam_options(eps=1e-8),
            "momentum": Option.number(0.95, 0, 0.999999),
        },
        needs_full="targets",
        states="mn",
        state_bytes=muon_states,
        colour="#E69F00",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in ROWS}
