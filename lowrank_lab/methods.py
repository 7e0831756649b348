"""METHODS: what each method is made of, and the only home of its defaults.

A method is a row: which layers it replaces, which optimizer it trains with, its options with their
defaults and its source. `resolve` fills a configuration from the row and checks what only the
method can know; `build` makes the model and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, RunConfig, nearest
from lowrank_lab.corpus import vocabulary
from lowrank_lab.layers import FactorizedLinear, factorize, target_layers
from lowrank_lab.llama import Llama
from lowrank_lab.optim import Fira, GaLore
from lowrank_lab.optim.projection import PROJ_TYPES, REFRESHES

# (parameters of the target layers, all other parameters, resolved configuration) → optimizer
OptimizerBuilder = Callable[[list[Tensor], list[Tensor], RunConfig], torch.optim.Optimizer]


@dataclass(frozen=True)
class Option:
    """One method option: its default and what is allowed."""

    default: Any
    allowed: str
    check: Callable[[Any], bool]
    real: bool = False  # a real number, kept as a float

    @classmethod
    def number(cls, default: float | None, low: float, high: float) -> Option:
        def check(value: Any) -> bool:
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and low <= value <= high
            )

        return cls(default, f"a number from {low:g} to {high:g}", check, real=True)

    @classmethod
    def whole(cls, default: int, low: int) -> Option:
        def check(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        return cls(default, f"a whole number from {low}", check)

    @classmethod
    def choice(cls, default: str, names: tuple[str, ...]) -> Option:
        return cls(default, f"one of {', '.join(names)}", lambda value: value in names)


@dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    name: str
    summary: str
    source: str
    optimizer: OptimizerBuilder
    lr: float
    layers: str | None = None  # kind of factorised layer, None for dense weights
    uses_rank: bool = False
    init: str | None = None  # default initialisation of the factors
    options: Mapping[str, Option] = field(default_factory=dict)


def _adamw(targets: list[Tensor], rest: list[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    options = config.method_options
    return torch.optim.AdamW(
        [{"params": group} for group in (targets, rest) if group],
        lr=_peak(config),
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        weight_decay=config.weight_decay,
        fused=True,
    )


def _projected(optimizer: Callable[..., torch.optim.Optimizer], *keys: str) -> OptimizerBuilder:
    """An optimizer whose first group has a rank and the given options as group keys."""

    def build(
        targets: list[Tensor], rest: list[Tensor], config: RunConfig
    ) -> torch.optim.Optimizer:
        options = config.method_options
        ranked = {"params": targets, "rank": config.rank, **{key: options[key] for key in keys}}
        return optimizer(
            [ranked, *([{"params": rest}] if rest else [])],
            lr=_peak(config),
            betas=(options["beta1"], options["beta2"]),
            eps=options["eps"],
            weight_decay=config.weight_decay,
        )

    return build


def _peak(config: RunConfig) -> float:
    assert config.lr is not None, "resolve the configuration first"
    return config.lr


def _adam_options(eps: float) -> dict[str, Option]:
    return {
        "beta1": Option.number(0.9, 0, 0.999999),
        "beta2": Option.number(0.999, 1e-6, 0.999999),
        "eps": Option.number(eps, 1e-30, 1),
    }


def _projection_options(proj_types: tuple[str, ...]) -> dict[str, Option]:
    return {
        "update_proj_gap": Option.whole(200, 1),
        "proj_type": Option.choice("std", proj_types),
        "refresh": Option.choice("svd", REFRESHES),
    }


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="full-rank",
            summary="dense weights, AdamW: what all others are measured against",
            source="1711.05101",
            optimizer=_adamw,
            lr=5e-3,
            options=_adam_options(eps=1e-8),
        ),
        Method(
            name="low-rank",
            summary="W = (α/r)·B·A from scratch, AdamW on the factors",
            source="2505.22922",
            optimizer=_adamw,
            lr=5e-3,
            layers="low-rank",
            uses_rank=True,
            init="kaiming",
            options={
                **_adam_options(eps=1e-8),
                "alpha": Option.number(None, 1e-6, 1e6),  # 32 with kaiming, the rank with spectral
            },
        ),
        Method(
            name="galore",
            summary="dense weights, Adam in a rank-r subspace of the gradient, renewed by SVD",
            source="2403.03507",
            optimizer=_projected(GaLore, "update_proj_gap", "scale", "proj_type", "refresh"),
            lr=5e-3,
            uses_rank=True,
            options={
                **_adam_options(eps=1e-6),
                **_projection_options(PROJ_TYPES),
                "scale": Option.number(0.25, 0, 1000),
            },
        ),
        Method(
            name="fira",
            summary="GaLore plus the gradient outside the subspace, scaled and growth-limited",
            source="2410.01623",
            optimizer=_projected(Fira, "update_proj_gap", "alpha", "proj_type", "refresh"),
            lr=5e-3,
            uses_rank=True,
            options={
                **_adam_options(eps=1e-6),
                **_projection_options(("std", "reverse_std", "left", "right")),
                "alpha": Option.number(1.0, 0, 1000),
            },
        ),
    )
}


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with every `None` that the run needs filled in, and checked against the
    method.

    Fields that the method has no use for (a rank for full-rank) become `None`, so that equal runs
    have equal ids; asking for something that would then silently not happen is refused.

    Raises:
        InputError: an unknown method or option, a rank that doesn't fit every target layer, a
        technique
            that the method has nothing to apply to.
    """
    if config.method not in METHODS:
        raise InputError("method", config.method, nearest(config.method, METHODS))
    method = METHODS[config.method]
    changes: dict[str, Any] = {"vocab_size": vocabulary(config), "lr": config.lr or method.lr}
    changes |= {"steps": config.total_steps, "tokens": None}
    for name in ("eval_every", "spectra_every", "checkpoint_every"):
        changes[name] = config.cadence(name)
    if method.layers is None:
        if config.refactor_every:
            allowed = f"{method.name} has no factors to refactorize; 0"
            raise InputError("refactor_every", config.refactor_every, allowed)
        if config.init is not None:
            raise InputError("init", config.init, f"{method.name} has no factors to initialise")
    else:
        changes["init"] = config.init or method.init
    if not config.reset_every or not config.reset_strength:
        changes |= {"reset_every": 0, "reset_strength": 1.0, "recovery_steps": 0}
    changes["rank"] = _checked_rank(config, method)
    changes["method_options"] = _checked_options(config, method, changes)
    return config.replace(**changes)


def _checked_rank(config: RunConfig, method: Method) -> int | None:
    with torch.device("meta"):
        layers = list(target_layers(Llama(config.size), config.target))
    if not layers:
        raise InputError("target", config.target, "must match a linear layer of the model")
    if not method.uses_rank:
        return None
    rank = config.rank if config.rank is not None else max(1, config.size.hidden_size // 4)
    for name, layer in layers:
        limit = min(layer.in_features, layer.out_features)
        if rank > limit:
            shape = f"{layer.out_features}×{layer.in_features}"
            raise InputError("rank", rank, f"must be from 1 to {limit}: {name} is {shape}")
        if method.layers is not None and name == "lm_head":
            raise InputError("target", config.target, "it matches lm_head, which stays full rank")
    return rank


def _checked_options(config: RunConfig, method: Method, changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in config.method_options.items():
        if name not in method.options:
            known = nearest(name, method.options)
            raise InputError("method_options", name, f"{method.name} has no such option; {known}")
        option = method.options[name]
        if value is not None and not option.check(value):
            raise InputError(f"method_options.{name}", value, f"must be {option.allowed}")
    given = {n: v for n, v in config.method_options.items() if v is not None}
    options = {n: o.default for n, o in method.options.items()} | given
    for name, value in options.items():
        if method.options[name].real and value is not None:
            options[name] = float(value)  # 32 and 32.0 are the same run: one id
    if method.layers is not None and options["alpha"] is None:
        options["alpha"] = 32.0 if changes["init"] == "kaiming" else float(changes["rank"])
    return options


def build(config: RunConfig) -> tuple[Llama, torch.optim.Optimizer]:
    """The model, initialised by the seed, and its optimizer; on the CPU, in the run's weight dtype.

    Args:
        config: resolved or not.
    """
    config = resolve(config)
    method = METHODS[config.method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Llama(config.size, config.initializer_range, config.activation_checkpointing)
        if method.layers is not None:
            assert config.rank is not None
            factorize(
                model, method.layers, rank=config.rank, target=config.target,
                init=config.init, alpha=config.method_options["alpha"],
            )  # fmt: skip
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    targets, rest = partition(model, config.target)
    return model, method.optimizer(targets, rest, config)


def partition(model: nn.Module, target: str) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters of the target layers, and all others: each in exactly one list."""
    of_targets = {
        id(p)
        for _, layer in target_layers(model, target)
        for p in (layer.factors() if isinstance(layer, FactorizedLinear) else (layer.weight,))
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    targets: list[Tensor] = [p for p in trainable if id(p) in of_targets]
    rest: list[Tensor] = [p for p in trainable if id(p) not in of_targets]
    if len({id(p) for p in trainable}) != len(targets) + len(rest):
        raise ValueError("target: a parameter is in two groups")
    return targets, rest
