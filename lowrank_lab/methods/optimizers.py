"""The optimizer of each method, from parameters and a configuration."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.config import InputError, ResolvedConfig, RunConfig
from lowrank_lab.optim import Combined, Loro, NorMuon, Scale, Spectron
from lowrank_lab.optim.eight_bit import EIGHT_BIT
from lowrank_lab.optim.flagged_8bit import adamw_8bit_class
from lowrank_lab.optim.muon import Muon
from lowrank_lab.optim.state_bytes import Weight, adamw_states

NORMUON_EPS = 1e-10  # of the row averages, as published
ADAMS = ("torch.optim.Adam", "torch.optim.AdamW")
# (parameters of the target layers, all other parameters, configuration) → optimizer
OptimizerBuilder = Callable[[list[Tensor], list[Tensor], ResolvedConfig], torch.optim.Optimizer]


def adamw(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or the optimizer that the configuration names, for all parameters."""
    groups = _groups(targets, rest)
    if config.optimizer is not None:
        named = import_optimizer(config.optimizer)
        try:
            shared: dict[str, Any] = {"lr": config.lr}
            if "weight_decay" in inspect.signature(named).parameters:
                shared["weight_decay"] = config.weight_decay
            return named(groups, **{**shared, **config.optimizer_options})
        except Exception as error:  # whatever a foreign class raises
            raise InputError("optimizer_options", config.optimizer_options, str(error)) from None
    return torch.optim.AdamW(groups, fused=True, **_adam(config))


def projected(
    optimizer: Callable[..., torch.optim.Optimizer], *keys: str, seeded: bool = False
) -> OptimizerBuilder:
    """An optimizer whose target group has a rank and the given options as group keys."""

    def build(
        targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
    ) -> torch.optim.Optimizer:
        ranked = {"rank": config.rank, **{key: config.method_options[key] for key in keys}}
        ranked |= {"seed": config.seed} if seeded else {}
        groups = _groups(targets, rest, ranked)
        return optimizer(groups, **_adam(config), **precision_choices(config))

    return build


def precision_choices(config: RunConfig) -> dict[str, Any]:
    """State dtype and rounding of a projected optimizer, where they are not the defaults."""
    names = ("state_precision", "stochastic_rounding")
    fields = RunConfig.model_fields
    return {n: getattr(config, n) for n in names if getattr(config, n) != fields[n].default}


def uniform(optimizer: Callable[..., torch.optim.Optimizer], *keys: str) -> OptimizerBuilder:
    """An optimizer that treats all parameters alike and takes the given options."""

    def build(
        targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
    ) -> torch.optim.Optimizer:
        options = {key: config.method_options[key] for key in keys}
        return optimizer(_groups(targets, rest), **_adam(config), **options)

    return build


def loro(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """LORO: the factors of the target layers in pairs B, A."""
    ranked = {"rank": config.rank, "update_k": config.method_options["update_k"]}
    return Loro(_groups(targets, rest, ranked), **_adam(config))


def scale(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """SCALE: the targets, the embedding and the head normalized, AdamW on all others.

    The embedding is the first weight of the model, and the head the last.
    """
    options = config.method_options
    embedding, *rest = rest
    targets, of_head = list(targets), targets if re.search(config.target, "lm_head") else rest
    head = targets.pop() if of_head is not rest else rest.pop()
    groups: list[dict[str, Any]] = [
        {"params": targets, "norm_dim": 1},
        {"params": [embedding], "norm_dim": 0},
        {"params": rest},
        {"params": [head], "norm_dim": 1, "momentum": options["momentum"]},
    ]
    adam = _adam(config) | {"adam_scale": options["adam_scale"]}
    return Scale([group for group in groups if group["params"]], **adam)


def normuon(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """NorMuon for the target matrices, and AdamW for the rest."""
    options = config.method_options
    keys = {"use_muon": True, "beta2": options["row_beta2"], "eps": NORMUON_EPS}
    keys |= {name: options[name] for name in ("momentum", "update_scale", "ns_precision")}
    return NorMuon(_groups(targets, rest, keys), **_adam(config))


def spectron(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """Spectron: the factors of the target layers in pairs B, A."""
    options = config.method_options
    keys = {"rank": config.rank} | {n: options[n] for n in ("momentum", "ns_precision")}
    adam = _adam(config) | {"adam_scale": options["adam_scale"]}
    return Spectron(_groups(targets, rest, keys), **adam)


def muon(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """torch's Muon for the target matrices and fused AdamW for the rest, as one optimizer."""
    options = config.method_options
    matrices = Muon(
        targets,
        lr=config.lr,
        momentum=options["momentum"],
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Combined(matrices, torch.optim.AdamW(rest, fused=True, **_adam(config)))


def muon_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of one momentum for the matrices, and AdamW's states for the rest."""
    return w.nbytes if w.target else adamw_states(w, config)


def adamw_8bit(
    targets: list[Tensor], rest: list[Tensor], config: ResolvedConfig
) -> torch.optim.Optimizer:
    """torchao's AdamW with 8-bit moments; its first step compiles it."""
    try:
        cls: Any = adamw_8bit_class()
    except ImportError as error:
        eight_bit = config.state_precision == EIGHT_BIT
        field = ("state_precision", EIGHT_BIT) if eight_bit else ("method", config.method)
        raise InputError(*field, str(error)) from None
    optimizer: torch.optim.Optimizer = cls(_groups(targets, rest), **_adam(config))
    return optimizer


def imported(field: str, path: str) -> Any:
    """What `module.Name` stands for.

    Raises:
        InputError: of this field, if there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a foreign module raises
        raise InputError(field, path, f"can't be imported: {error}") from None


def import_optimizer(path: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer class at `module.Class`.

    Raises:
        InputError: there is no such module or class, or it isn't an optimizer.
    """
    found = imported("optimizer", path)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise InputError("optimizer", path, "must name a class of torch.optim.Optimizer")
    return found


def _groups(
    targets: list[Tensor], rest: list[Tensor], keys: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of the targets, with `keys`, and of the rest; without empty groups."""
    groups = [{"params": targets, **(keys or {})}, {"params": rest}]
    return [group for group in groups if group["params"]]


def _adam(config: ResolvedConfig) -> dict[str, Any]:
    options, shared = config.method_options, {"lr": config.lr, "weight_decay": config.weight_decay}
    if "beta1" not in options:  # its averages are not Adam's
        return shared
    return shared | {"betas": (options["beta1"], options["beta2"]), "eps": options["eps"]}
