"""The optimizers of the package, one row each: what tests/unit/optim/test_contract.py runs over.

A new optimizer adds a row to ROWS (and its equations to equations.py), and has all tests of the
contract. Facts that it alone has are tested in a file of its own.
"""

import math
from functools import partial
from itertools import product

import equations
import pytorch_optimizer
import torch
from apollo_torch import APOLLOAdamW
from fira import FiraAdamW
from galore_torch import GaLoreAdamW
from optimizer_trial import Row
from small_matrices import (
    GAP,
    ONE_SIDED,
    SQUARE,
    TALL,
    WIDE,
    is_left,
    noisy_gradients,
    spiky_gradients,
)  # fmt: skip

from lowrank_lab import optim

NEVER = 10**9
ANY_SHAPES = (SQUARE, TALL, WIDE, (1, 7), (7, 1), (9,), (), (3, 4, 2))
FACTORS = ((16, 16, 4), (24, 10, 3), (10, 24, 3), (12, 9, 1), (9, 6, 6), (6, 9, 6), (8, 8, 8),
           (12, 30, 8), (30, 12, 8), (13, 13, 9), (1, 5, 1), (5, 1, 1), (1, 1, 1))  # fmt: skip
DECAY = {"weight_decay": 0.1}
PUBLISHED = {"forgive_zero": False}  # a gradient may lie inside Fira's subspace at a refresh


def combined(groups, **options):
    rest, matrix = groups
    return optim.Combined(optim.GaLore([matrix], **options), torch.optim.AdamW(**rest, **options))


def galore_is_right(shape, rank, keys):
    """The package guesses the side from the projected shape, and misses where that is square."""
    return (shape, rank, keys.get("proj_type")) != (WIDE, min(WIDE), "reverse_std")


def fira_is_right(shape, rank, keys):
    square = is_left(keys.get("proj_type", "std"), shape) and rank == shape[1]
    return not square and galore_is_right(shape, rank, keys)


def apollo_is_right(shape, rank, keys):
    """The package takes the longer side of G for the channels' axis, whatever it projects."""
    left = is_left(keys.get("proj_type", "std"), shape)
    return keys.get("scale_type") == "tensor" or left == (shape[0] < shape[1])


def spam_in_package(**keys):
    return {"warmup_epoch" if k == "warmup" else k: v for k, v in keys.items()}


def published(is_right, shape, rank, keys):
    """Packages keep Adam's moments at a refresh."""
    return "on_refresh" not in keys and is_right(shape, rank, keys)


FOLLOWING = ({"on_refresh": "reset"}, {"on_refresh": "transport"})
TWO_SIDED = ({"proj_type": "full"},)
SIDES = tuple({"proj_type": proj_type} for proj_type in ONE_SIDED)
GAPS = {"update_proj_gap": GAP}
OFTEN = {"update_proj_gap": 2}
BAD_PROJECTIONS = (
    ({"rank": 0}, "rank: 0"), ({"rank": -1}, "rank: -1"), ({"rank": 2.0}, "rank: 2.0"),
    ({"rank": None}, "rank: None"), ({"rank": 5}, "rank: 5"),
    ({"update_proj_gap": 0}, "update_proj_gap: 0"),
    ({"update_proj_gap": 0.5}, "update_proj_gap: 0.5"),
    ({"proj_type": "diagonal"}, "proj_type: 'diagonal'"),
)  # fmt: skip
ADAM = {"steps": 400, "lr": 0.3, "share": 1e-6, "rank": 3, "update_proj_gap": 20}

# At full rank the rest is rounding noise, whose sign is taken
FRUGAL_SIZES = tuple((shape, r) for shape in (SQUARE, TALL, WIDE) for r in (1, 4))
GALORE = Row(
    "galore", optim.GaLore, {**GAPS, "scale": 1.0, "proj_type": "std"}, OFTEN,
    equations=equations.galore, package=partial(GaLoreAdamW, no_deprecation_warning=True),
    cases=(*SIDES, *TWO_SIDED, DECAY, {"scale": 0.25}, {"scale": 2.0}, *FOLLOWING),
    package_is_right=partial(published, galore_is_right), converges=ADAM,
    unknown=("alpha", "update_proj_gpa"),
    refused=(*BAD_PROJECTIONS, ({"refresh": "qr"}, "refresh: 'qr'"),
             ({"on_refresh": "published"}, "on_refresh: 'published'")),
)  # fmt: skip
FIRA = Row(
    "fira", optim.Fira, {**GAPS, "alpha": 1.0, "proj_type": "std"}, OFTEN,
    equations=equations.fira, package=partial(FiraAdamW, no_deprecation_warning=True),
    cases=tuple(
        PUBLISHED | keys
        for keys in (*SIDES, DECAY, *({"alpha": a} for a in (0.5, 2.0, 3.0)), *FOLLOWING)
    ),
    half=(PUBLISHED,),
    # It adds its two parts to W one after the other: two roundings where the package has one.
    package_is_right=partial(published, fira_is_right), bf16=2.0, converges=ADAM,
    unknown=("scale",),
    refused=(*BAD_PROJECTIONS, ({"proj_type": "full"}, "proj_type: 'full'"),
             ({"forgive_zero": 1}, "forgive_zero: 1"),
             ({"on_refresh": True}, "on_refresh: True")),
)  # fmt: skip
GOLORE = Row(
    "golore", optim.GoLore, {**GAPS, "scale": 1.0, "switch": 15}, {**OFTEN, "switch": 3},
    equations=equations.golore,
    cases=(
        *(side | {"switch": s} for side, s in product(SIDES, (0, 15, NEVER))),
        {"proj_type": "full", "switch": 0}, DECAY, {"scale": 0.25}, {"scale": 2.0},
        *({"on_refresh": how, "proj_type": side, "switch": 0}
          for how in ("keep", "reset", "transport") for side in ("std", "full")),
    ),
    converges=ADAM | {"rank": 5, "steps": 800, "switch": 200}, unknown=("alpha",),
    stops=(9, 10, 14, 19, 20, 21),  # the switch is at 15, the first random projection at 20
    refused=(
        *BAD_PROJECTIONS, ({"refresh": "qr"}, "refresh: 'qr'"), ({"switch": -1}, "switch: -1"),
        ({"switch": 0.8}, "switch: 0.8"), ({"switch": True}, "switch: True"),
        ({"seed": -1}, "seed: -1"), ({"seed": None}, "seed: None"),
        ({"on_refresh": "carry"}, "on_refresh: 'carry'"),
    ),
)  # fmt: skip
FRUGAL = Row(
    "frugal", optim.Frugal, {**GAPS, "proj": "svd", "proj_type": "std"}, OFTEN,
    equations=equations.frugal, sizes=FRUGAL_SIZES,
    cases=(
        *(side | {"proj": proj} for side in SIDES for proj in ("svd", "columns", "random")),
        DECAY, {"inactive_lr_scale": 0.1}, {"inactive_lr_scale": 0.0}, {"on_refresh": "keep"},
        *({"on_refresh": "transport", "proj": proj} for proj in ("svd", "columns", "random")),
    ),
    converges={"steps": 500, "lr": 0.03, "share": 1e-5, "rank": 3, "update_proj_gap": 100},
    unknown=("scale", "switch"),
    refused=(
        *BAD_PROJECTIONS[:3], *BAD_PROJECTIONS[4:], ({"rank": None}, "rank: None"),
        ({"proj_type": "full"}, "proj_type: 'full'"), ({"refresh": "qr"}, "refresh: 'qr'"),
        ({"proj": "rows"}, "proj: 'rows'"), ({"density": 0.5}, "rank: "),
        ({"inactive_lr_scale": -1.0}, "inactive_lr_scale: -1.0"), ({"seed": -1}, "seed: -1"),
        ({"on_refresh": "published"}, "on_refresh: 'published'"),
        ({"rank": None, "density": 0.0}, "density: 0.0"),
        ({"rank": None, "density": 1.1}, "density: 1.1"),
    ),
)  # fmt: skip
LDADAM = Row(
    "ldadam", optim.LDAdam, {"rho": 0.908}, {}, equations=equations.ldadam,
    cases=(*SIDES, DECAY, {"error_feedback": False}, {"error_feedback": False, **DECAY},
           {"rho": 0.5}, {"rho": 0.0}),
    converges={"steps": 500, "lr": 0.03, "share": 3e-4, "rank": 3},
    unknown=("update_proj_gap", "scale"), stops=(1, 7),
    refused=(
        *(bad for bad in BAD_PROJECTIONS if "update_proj_gap" not in bad[0]),
        ({"proj_type": "full"}, "proj_type: 'full'"), ({"refresh": "qr"}, "refresh: 'qr'"),
        ({"rho": 1.0}, "rho: 1.0"), ({"rho": -0.1}, "rho: -0.1"), ({"rho": None}, "rho: None"),
        ({"error_feedback": 1}, "error_feedback: 1"),
    ),
)  # fmt: skip
APOLLO = Row(
    "apollo", optim.Apollo,
    {**GAPS, "scale": 1.0, "proj": "random", "proj_type": "std", "scale_type": "channel"}, OFTEN,
    equations=equations.apollo, package=APOLLOAdamW, package_is_right=apollo_is_right,
    half=({}, {"scale_type": "tensor"}),
    cases=(
        *(side | {"proj": proj, "scale_type": kind} for side, proj, kind
          in product(SIDES, ("random", "svd"), ("channel", "tensor"))),
        DECAY, {"scale": 4.0, "scale_type": "tensor"},
    ),
    converges=ADAM | {"rank": 4}, unknown=("refresh",),
    refused=(
        *BAD_PROJECTIONS, ({"proj_type": "full"}, "proj_type: 'full'"),
        ({"proj": "randomized"}, "proj: 'randomized'"), 
        ({"scale_type": "row"}, "scale_type: 'row'"),
        ({"scale": -1.0}, "scale: -1.0"), ({"scale": math.nan}, "scale: nan"),
        ({"scale": "big"}, "scale: 'big'"), ({"scale_front": 1}, "scale_front: 1"),
        ({"disable_nl": None}, "disable_nl: None"),
        ({"store_projection": "no"}, "store_projection: 'no'"),
        ({"store_projection": False, "proj": "svd"}, "store_projection: False"),
        ({"seed": -1}, "seed: -1"), ({"seed": 0.5}, "seed: 0.5"),
    ),
)  # fmt: skip
SPAM = Row(
    "spam", optim.Spam,
    {"update_proj_gap": 25, "warmup": 10, "grad_accu_steps": 5, "threshold": 100},
    {**OFTEN, "warmup": 1, "grad_accu_steps": 1}, "whole", spiky_gradients, 80,
    equations=equations.spam, package=pytorch_optimizer.SPAM, theirs=spam_in_package,
    sizes=tuple((shape, None) for shape in ANY_SHAPES), cases=({}, DECAY),
    stops=(4, 5, 23, 24, 25, 29),  # clipping begins at 5, the reset is at 25
    converges={"steps": 600, "lr": 0.1, "share": 1e-3, "update_proj_gap": 50, "warmup": 5},
    unknown=("gamma1", "rank"),
    refused=(
        ({"lr": -1.0}, "lr: "), ({"betas": (1.0, 0.9)}, "betas: "), ({"eps": -1e-9}, "eps: "),
        ({"weight_decay": -0.1}, "weight_decay: "), ({"threshold": -1}, "threshold: "),
        ({"update_proj_gap": 0}, "update_proj_gap: "),
        ({"update_proj_gap": 2.5}, "update_proj_gap: "), ({"warmup": -1}, "warmup: "),
        ({"warmup": 1.5}, "warmup: "), ({"grad_accu_steps": -1}, "grad_accu_steps: "),
        ({"density": 0.0}, "density: "), ({"density": 1.1}, "density: "),
    ),
)  # fmt: skip
STABLE_SPAM = Row(
    "stable-spam", optim.StableSpam, {"update_proj_gap": 25}, OFTEN, "whole", spiky_gradients, 80,
    equations=equations.stable_spam, package=pytorch_optimizer.StableSPAM,
    sizes=SPAM.sizes, cases=SPAM.cases,
    converges={"steps": 600, "lr": 0.1, "share": 1e-3, "update_proj_gap": 50},
    unknown=("density",), stops=(7, 23, 24, 25),
    refused=(
        ({"lr": -1.0}, "lr: "), ({"gamma1": 1.0}, "gamma1: "), ({"gamma2": -0.1}, "gamma2: "),
        ({"theta": 1.0}, "theta: "), ({"update_proj_gap": 0}, "update_proj_gap: "),
    ),
)  # fmt: skip
LORO = Row(
    "loro", optim.Loro, {"update_k": 10}, {"update_k": 2}, "factors", noisy_gradients, 34,
    equations=equations.loro, tolerance=1e-3,
    sizes=tuple(((m, n), r) for m, n, r in FACTORS), cases=({}, DECAY, {"scale": 4.0}),
    converges={"steps": 1000, "lr": 0.05, "share": 1e-4, "rank": 3, "update_k": 50, "scale": 1.0},
    unknown=("alpha",), stops=(8, 9, 10, 19),  # steps 10 and 20 are exact
    refused=(
        ({"rank": 0}, "rank: 0"), ({"rank": 3}, r"params: \(\(6, 2\), \(2, 4\)\)"),
        ({"rank": 2.0}, "rank: 2.0"), ({"update_k": 0}, "update_k: 0"),
        ({"update_k": 1.5}, "update_k: 1.5"), ({"scale": 0.0}, "scale: 0.0"),
        ({"scale": -1}, "scale: -1"),
    ),
)  # fmt: skip
ROWS = (
    Row("adamw", optim.ProjectedAdamW, {}, {}, "whole",
        converges={"steps": 400, "lr": 0.3, "share": 1e-6}),
    Row("combined", combined, {**GAPS, "scale": 1.0}, OFTEN, converges=ADAM),
    GALORE, GALORE.with_("randomized", {"refresh": "randomized"}),
    GALORE.with_("gram", {"refresh": "gram"}), GALORE.with_("subspace", {"refresh": "subspace"}),
    GALORE.with_("full", {"proj_type": "full"}, converges={}),
    GALORE.with_("reverse", {"proj_type": "reverse_std"}, converges={}),
    FIRA, FIRA.with_("randomized", {"refresh": "randomized"}),
    FIRA.with_("gram", {"refresh": "gram"}), FIRA.with_("subspace", {"refresh": "subspace"}),
    FIRA.with_("reverse", {"proj_type": "reverse_std"}, converges={}),
    GOLORE, GOLORE.with_("exact", {"switch": NEVER}, {"switch": NEVER}, converges={}),
    GOLORE.with_("random", {"switch": 0}, {"switch": 0},
                 converges=GOLORE.converges | {"switch": 0}),
    GOLORE.with_("full", {"proj_type": "full"}, converges={}),
    GOLORE.with_("reverse", {"proj_type": "reverse_std", "refresh": "randomized"},
                 converges={}),
    APOLLO, APOLLO.with_("regenerated", {"store_projection": False}),
    APOLLO.with_("svd", {"proj": "svd"}), APOLLO.with_("subspace", {"proj": "subspace"}),
    APOLLO.with_("mini", {"scale_type": "tensor", "scale": 128.0, "store_projection": False},
                 converges=APOLLO.converges | {"lr": 0.03}),
    FRUGAL, FRUGAL.with_("columns", {"proj": "columns"}, converges={}),
    FRUGAL.with_("random", {"proj": "random", "on_refresh": "transport"}, converges={}),
    LDADAM,
    LDADAM.with_("alone", {"error_feedback": False},
                 converges={"steps": 500, "lr": 0.1, "share": 1e-6, "rank": 3}),
    LDADAM.with_("reverse", {"proj_type": "reverse_std"}, converges={}),
    SPAM, STABLE_SPAM,
    SPAM.with_("half", {"density": 0.5}, converges={}, equations=equations.spam,
               sizes=tuple((shape, None) for shape in (SQUARE, TALL, WIDE, (1, 7), (7, 1))),
               cases=tuple({"density": d} | decay for d in (0.05, 0.5, 0.99)
                           for decay in ({}, DECAY))),
    LORO,
    *(row.with_(f"{how} {side}", {"on_refresh": how, "proj_type": side}, converges={})
      for row, sides in ((GALORE, ("std", "full")), (FIRA, ("std", )), (GOLORE, ("std", )))
      for how in ("reset", "transport") for side in sides),
)  # fmt: skip
