"""Rows of METHODS whose weights and updates are dense.

`methods.registry` joins the families and says where learning rates come from.
"""

from __future__ import annotations

from lowrank_lab.methods.method import REST_LR, Method
from lowrank_lab.methods.optimizers import (
    adamw,
    adamw_8bit,
    muon,
    muon_states,
    normuon,
    scale,
    uniform,
)
from lowrank_lab.methods.options import (
    ByWidth,
    Option,
    adam_options,
)
from lowrank_lab.optim import Spam, StableSpam
from lowrank_lab.optim.momentum import NS_PRECISIONS
from lowrank_lab.optim.normuon import UPDATE_SCALES, normuon_states
from lowrank_lab.optim.scale import scale_states
from lowrank_lab.optim.spam import spam_states
from lowrank_lab.optim.stable_spam import stable_spam_states
from lowrank_lab.optim.state_bytes import (
    adamw_8bit_states,
    adamw_states,
)

_DENSE_LR = ByWidth({48: 6.19e-3, 64: 3.54e-3, 96: 1.47e-3, 512: 1e-3, 1024: 1e-3, 2048: 5e-4})

FULL_RANK = Method(
    name="full-rank",
    summary="dense weights, AdamW: what all others are measured against",
    source="1711.05101",
    year=2017,
    use="the baseline: when memory is no limit",
    optimizer=adamw,
    lr=_DENSE_LR,
    rest_lr=REST_LR,
    options=adam_options(eps=1e-8, beta2=0.99),
    needs_full="none",
    states="2mn",
    state_bytes=adamw_states,
    colour="#000000",
)

DENSE = (
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
        lr=ByWidth({48: 6.89e-3, 512: 1e-3, 768: 8e-4, 1024: 4e-4}),
        rest_lr=REST_LR,
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
        colour="#BB33FF",
    ),
    Method(
        name="stable-spam",
        summary="Adam on gradients clipped by their running maximum and norm",
        source="2502.17055",
        year=2025,
        parent="spam",
        use="the same, in low precision or at high learning rates",
        optimizer=uniform(StableSpam, "gamma1", "gamma2", "theta", "update_proj_gap"),
        lr=ByWidth({48: 7.1e-3, 512: 1e-3, 768: 8e-4, 1024: 4e-4}),
        rest_lr=REST_LR,
        options={
            **adam_options(eps=1e-8, beta2=0.99),
            "gamma1": Option.number(0.7, 0, 0.999999),
            "gamma2": Option.number(0.9, 0, 0.999999),
            "theta": Option.number(0.999, 0, 0.999999),
            "update_proj_gap": Option.integer(1000, 1),
        },
        needs_full="none",
        states="2mn + 3",
        state_bytes=stable_spam_states,
        colour="#440077",
    ),
    Method(
        name="adamw-8bit",
        summary="dense weights, AdamW with moments of 8 bits (torchao)",
        source="2110.02861",
        year=2021,
        parent="full-rank",
        use="a quarter of AdamW's states, no other hyperparameter",
        optimizer=adamw_8bit,
        lr=ByWidth(_DENSE_LR | {48: 5.98e-3}),
        rest_lr=REST_LR,
        options=adam_options(eps=1e-8),
        states="2mn of 1 byte; a scale per block",
        state_bytes=adamw_8bit_states,
        fake_steps=False,
        colour="#551144",
    ),
    Method(
        name="muon",
        summary="orthogonalised momentum for the matrices, AdamW for the rest (torch)",
        source="Muon (K. Jordan 2024)",
        year=2024,
        use="half of AdamW's states, if each matrix fits on a device",
        optimizer=muon,
        lr=ByWidth({48: 1.84e-2, 64: 1.37e-2, 96: 8.87e-3, 512: 2e-3, 2048: 1e-3}),
        rest_lr=REST_LR,
        options={
            **adam_options(eps=1e-8, beta2=0.6),
            "momentum": Option.number(ByWidth({96: 0.8, 512: 0.95}), 0, 0.999999),
        },
        needs_full="targets",
        states="mn; AdamW's 2 for embedding and head: 56 % of the weights of 60m, 10 % of 1b",
        state_bytes=muon_states,
        colour="#E69F00",
    ),
    Method(
        name="scale",
        summary="normalized gradients without states, momentum for the head alone",
        source="2506.16659",
        year=2025,
        parent="full-rank",
        use="nearly no optimizer states with dense weights",
        optimizer=scale,
        lr=ByWidth({48: 5.13e-3, 64: 3.37e-3, 512: 1e-3, 1024: 1e-3, 2048: 2e-4, 4096: 1e-4}),
        rest_lr=REST_LR,
        options={
            **adam_options(eps=1e-8),
            "momentum": Option.number(0.9, 0, 0.999999),
            "adam_scale": Option.number(
                ByWidth({512: 1.0, 1024: 1.0, 2048: 5.0, 4096: 10.0}), 0, 1000
            ),
        },
        target_moments=False,
        needs_full="none",
        states="0; mn for the head",
        state_bytes=scale_states,
        colour="#AABB77",
    ),
    Method(
        name="normuon",
        summary="Muon with rows of equal size: an average per output",
        source="2510.05491",
        year=2025,
        parent="muon",
        use="Muon where some outputs would dominate the update",
        optimizer=normuon,
        lr=ByWidth({48: 1.76e-2, 64: 1.03e-2, 512: 2e-3, 2048: 1e-3}),
        rest_lr=REST_LR,
        options={
            **adam_options(eps=1e-8, beta2=0.99),
            "momentum": Option.number(ByWidth({96: 0.8, 512: 0.95}), 0, 0.999999),
            "row_beta2": Option.number(0.95, 0, 0.999999),
            "update_scale": Option.choice("match_rms", UPDATE_SCALES),
            "ns_precision": Option.choice("bf16", NS_PRECISIONS),
        },
        needs_full="none",
        states="mn + m; AdamW's 2 for embedding and head",
        state_bytes=normuon_states,
        colour="#AA7744",
    ),
)
