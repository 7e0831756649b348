"""The states of known optimizers: which are moments, and their values in a new optimizer.

A restart is exact only if every state is known. `reset_momentum_`, `prune_moments_` and
`transport_moments_` therefore accept the optimizers of this table and refuse all others. A test for
each row checks that after a full reset the next steps equal those of a new optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lowrank_lab.optim.base import ProjectedAdamW


@dataclass(frozen=True)
class Layout:
    """What the entries of a parameter's optimizer state are.

    An optimizer outside the table joins it with a class attribute `state_layout`, a dictionary of
    these attributes.

    Attributes:
        first: averages of gradients; a change of basis carries them exactly.
        second: averages or sums of squared gradients.
        counts: step counts and other scalars.
        others: tensors that can only be restarted, not pruned or carried.
        kept: what a reset leaves unchanged, such as projections and their schedule.
        fresh: values in a new optimizer that are not 0: a number, or the group key that has it.
        partial: how a reset with a strength below 1 works: by the stored `weights` of the averages,
            by one `step` count with Adam's `betas`, by scaling the `buffer`; None: it is refused.
        clears: a restart removes the entries; the optimizer creates them again.
        shared: parameters of a group share states, so that only whole groups can restart.
        group_counts: counters in groups; a restart sets them to their defaults or removes them.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    fresh: Mapping[str, float | str] = field(default_factory=dict)
    partial: Literal["weights", "step", "buffer"] | None = None
    clears: bool = False
    shared: bool = False
    group_counts: tuple[str, ...] = ()

    def knows(self, name: str) -> bool:
        """Whether the state `name` is one of this layout."""
        named = self.first + self.second + self.counts + self.others + self.kept
        return self.clears or name in named


ADAM = Layout(("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq"), ("step",), partial="step")
BUFFER = Layout(("momentum_buffer",), partial="buffer")
OWN = Layout(
    ("exp_avg",),
    ("exp_avg_sq",),
    kept=(
        "step", "exp_avg_weight", "exp_avg_sq_weight", "projection_left", "projection_right",
        "refresh_offset", "seed", "residual_norm", "error",
    ),
    partial="weights",
)  # fmt: skip
CLEARED = Layout(clears=True)

# By package and class name. A subclass counts too, unless it overrides `step` or adds states.
LAYOUTS: dict[str, Layout] = {
    "torch.Adam": ADAM,  # and AdamW, its subclass
    "torch.RAdam": ADAM,
    "torch.SparseAdam": ADAM,
    "torchao._AdamBase": ADAM,
    "torch.SGD": BUFFER,
    "torch.Muon": BUFFER,
    "torch.NAdam": Layout(
        ("exp_avg",), ("exp_avg_sq",), ("step", "mu_product"), fresh={"mu_product": 1.0}
    ),
    "torch.Adamax": Layout(("exp_avg",), counts=("step",), others=("exp_inf",)),
    # Its momentum_buffer averages preconditioned gradients.
    "torch.RMSprop": Layout(
        ("grad_avg",), ("square_avg",), ("step",), others=("momentum_buffer",)
    ),
    "torch.Adagrad": Layout(
        (), ("sum",), ("step",), fresh={"sum": "initial_accumulator_value"}
    ),
    "torch.Adadelta": Layout((), ("square_avg",), ("step",), others=("acc_delta",)),
    "torch.Adafactor": Layout(counts=("step",), others=("row_var", "col_var", "variance")),
    "torch.ASGD": Layout(
        counts=("step", "eta", "mu"), others=("ax",), fresh={"eta": "lr", "mu": 1.0}
    ),
    "torch.Rprop": Layout(
        counts=("step",), others=("prev", "step_size"), fresh={"step_size": "lr"}
    ),
    "torch.LBFGS": Layout(clears=True, shared=True),
    "transformers.Adafactor": CLEARED,
    "galore_torch.AdamW": CLEARED,
    "galore_torch.Adafactor": CLEARED,
    "fira.AdamW": CLEARED,
    "apollo_torch.AdamW": CLEARED,
}  # fmt: skip

# Optimizers of pytorch_optimizer (as pinned in constraints.txt) that restart without their states
# and without the counts of their groups.
PYTORCH_OPTIMIZER = """
    A2Grad ADOPT APOLLO AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaGO AdaHessian
    AdaMax AdaMod AdaMuon AdaNorm AdaPNM AdaShift AdaSmooth AdaTAM Adai Adalite AdamC AdamG AdamP
    AdamS AdamWSN Adan AggMo Aida Alice AliG Amos Ano ApolloDQN AvaGrad BCOS CAME Conda DASH
    DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam EmoLynx
    EmoNavi FAdam FOCUS FTRL Fira FlashAdamW GaLore Grams Gravity GrokFastAdamW Kate Kron LARS
    LaProp Lamb Lion LoRARite MARS MSVAG Muon Nero NorMuon NovoGrad PAdam PID PNM Prodigy QHAdam QHM
    RACS RAdam Ranger SCION SGDP SGDSaI SGDW SM3 SOAP SPlus SRMM SWATS ScalableShampoo
    ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD Shampoo SignSGD SimplifiedAdEMAMix
    SpectralSphere StableAdamW TAM Tiger VSGD Yogi
""".split()
_FIRST = {"Lion": "exp_avg", "Tiger": "exp_avg", "SignSGD": "momentum_buffer"}
_DADAPT = "d d_max d_hat d_numerator d_de_nom k gsq_weighted sk_sq_weighted sk_l1 g0_norm"
_COUNTS = {
    "AvaGrad": "gamma",
    "Kron": "update_counter",
    "ScheduleFree": "weight_sum lr_max",
    "DAdapt": f"{_DADAPT} numerator_weighted",
    "Prodigy": _DADAPT,
}
LAYOUTS |= {
    f"pytorch_optimizer.{name}": Layout(
        first=tuple(_FIRST.get(name, "").split()),
        clears=True,
        shared=True,
        group_counts=(
            "step", *(c for key, v in _COUNTS.items() if name.startswith(key) for c in v.split())
        ),
    )
    for name in PYTORCH_OPTIMIZER
}  # fmt: skip
# States that are copies or averages of weights, which a refactorization invalidates.
WEIGHT_COPIES = frozenset(
    "ax ema lookahead_params mov_avg_param p0 pbar prev_param slow_buffer slow_params x0 x_k "
    "z".split()
)


def short_name(cls: type) -> str:
    """Package and name of a class: torch.Adam, pytorch_optimizer.Lion."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _step_of(cls: type) -> Any:
    """The function `step` of a class, without torch's hooks around it."""
    return inspect.unwrap(cls.step)  # type: ignore[attr-defined]


def layout_of(optimizer: torch.optim.Optimizer) -> Layout:
    """The layout of an optimizer's states.

    Raises:
        ValueError: it is not known.
    """
    cls = type(optimizer)
    declared = getattr(cls, "state_layout", None)
    if declared is not None:
        return Layout(**declared)
    if isinstance(optimizer, ProjectedAdamW):
        return OWN
    for base in cls.__mro__:
        found = LAYOUTS.get(short_name(base))
        if found is not None and _step_of(cls) is _step_of(base):
            return found
    raise ValueError(
        f"optimizer: {cls.__name__} is not allowed; a restart is known for the optimizers of "
        "torch.optim, lowrank_lab.optim, torchao and most of pytorch_optimizer"
    )
