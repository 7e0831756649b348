"""METHODS: what each method is made of, and the only home of its defaults (the rows: catalogue.py).

A method is a row: which layers it replaces, which optimizer it trains with, its options with their
defaults and its source. `register_method` adds a row of one's own. `resolve` fills a configuration
from the row and checks what only the method can know; `build` makes the model and the optimizer.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, RunConfig, Size, nearest
from lowrank_lab.data.corpus import vocabulary
from lowrank_lab.layers import factorize, target_layers, train_dense_
from lowrank_lab.methods.optimizers import (
    OptimizerBuilder,
    adamw,
    adamw_8bit,
    import_optimizer,
    precision_choices,
)
from lowrank_lab.methods.options import ByWidth, Option, adam_options, at_width
from lowrank_lab.methods.registry import BUILT_IN, Method
from lowrank_lab.models.llama import Llama

OWN_METHODS = "LOWRANK_LAB_METHODS"
ADAMS = ("torch.optim.Adam", "torch.optim.AdamW")

METHODS: dict[str, Method] = {method.name: method for method in BUILT_IN}


def register_method(
    name: str,
    *,
    optimizer: OptimizerBuilder | None = None,
    layers: str | None = None,
    lr: float = 5e-3,
    defaults: Mapping[str, Any] | None = None,
    summary: str = "a method of one's own",
    source: str = "your own",
) -> Method:
    """Add a method of one's own: studies, tables, figures and the command line then know it.

    Args:
        name: what to call it; a name that is there is replaced.
        optimizer: (target parameters, other parameters, resolved configuration) → optimizer; AdamW
            by default. Its options are in `config.method_options`, the rank in `config.rank`.
        layers: kind of factorised layer (`layers.KINDS`), None for dense weights.
        lr: default peak learning rate.
        defaults: the method's options with their defaults; numbers stay numbers.

    Raises:
        ValueError: an unknown kind of layer, or a name that couldn't be typed on a command line.
    """
    from lowrank_lab.layers import KINDS

    if layers is not None and layers not in KINDS:
        raise ValueError(f"layers: {layers!r} is not allowed; {nearest(layers, KINDS)}")
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"name: {name!r} is not allowed; letters, digits, - and _")
    options = {
        **adam_options(eps=1e-8),
        **({"alpha": Option.number(None, 1e-6, 1e6)} if layers else {}),
        **{key: Option.like(value) for key, value in (defaults or {}).items()},
    }
    METHODS[name] = Method(
        name=name,
        summary=summary,
        source=source,
        optimizer=optimizer or adamw,
        lr=ByWidth({1: lr}),
        layers=layers,
        uses_rank=True,
        init="kaiming" if layers else None,
        options=options,
        layer_options=("alpha",) if layers else (),
    )
    return METHODS[name]


def load_own_methods(files: str | None = None) -> None:
    """Run Python files that register methods of one's own: those in $LOWRANK_LAB_METHODS.

    So the command line and the notebooks of a study know them too.

    Args:
        files: paths with os.pathsep between, instead of the variable, which is then set to them.

    Raises:
        InputError: there is no such file.
    """
    named = files if files is not None else os.environ.get(OWN_METHODS, "")
    for path in filter(None, named.split(os.pathsep)):
        if not Path(path).is_file():
            raise InputError(OWN_METHODS, path, "there is no such file")
        runpy.run_path(path)
    if files is not None:
        os.environ[OWN_METHODS] = files


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with every `None` that the run needs filled in, checked for the method.

    Fields that the method has no use for (a rank for full-rank) become `None`, so that equal runs
    have equal ids; asking for something that would then silently not happen is refused.

    Raises:
        InputError: an unknown method or option, a rank that doesn't fit every target layer, a
            technique that the method has nothing to apply to.
    """
    if config.method not in METHODS:
        raise InputError("method", config.method, nearest(config.method, METHODS))
    method = METHODS[config.method]
    changes: dict[str, Any] = {"vocab_size": vocabulary(config)}
    changes |= {"steps": config.total_steps, "tokens": None}
    for name in ("eval_every", "spectra_every", "checkpoint_every"):
        changes[name] = config.cadence(name)
    _check_techniques(config, method)
    if method.layers is not None:
        changes["init"] = config.init or method.init
    changes["rank"] = rank = _checked_rank(config, method)
    rate = method.learning_rate(config.size.hidden_size, changes.get("init"), rank)
    changes["lr"] = config.lr or rate
    changes["method_options"] = options = _checked_options(config, method, changes)
    if not config.reset_every or not config.reset_strength:
        changes |= {"reset_every": 0, "reset_strength": 1.0, "reset_how": "scale"}
        changes |= {"reset_moments": "both", "reset_params": "targets"}
        if not options.get("merge_every") and config.on_refactor != "reset":
            changes["recovery_steps"] = 0
    return config.replace(**changes)


def _check_techniques(config: RunConfig, method: Method) -> None:
    """Refuse what the method has nothing to apply to, or what can't go together."""
    dense = method.layers is None
    if dense and config.refactor_every:
        allowed = f"{method.name} has no factors to refactorize; 0"
        raise InputError("refactor_every", config.refactor_every, allowed)
    if dense and config.init is not None:
        raise InputError("init", config.init, f"{method.name} has no factors to initialise")
    if config.init == "spectral" and method.layers not in (None, "low-rank"):
        allowed = f"the factors of {method.name} stand beside other weights; kaiming"
        raise InputError("init", config.init, allowed)
    for name in ("on_refactor", "refactor_basis", "refactor_above"):
        value, default = getattr(config, name), RunConfig.model_fields[name].default
        if value != default and not config.refactor_every:
            raise InputError(name, value, f"needs refactor_every; or {default}")
    if config.optimizer is not None:
        if method.optimizer is not adamw:
            allowed = f"{method.name} brings an optimizer of its own"
            raise InputError("optimizer", config.optimizer, allowed)
        import_optimizer(config.optimizer)
        if "lr" in config.optimizer_options:
            allowed = "lr is a field of the run, which the schedule follows"
            raise InputError("optimizer_options", config.optimizer_options, allowed)
    elif config.optimizer_options:
        raise InputError("optimizer_options", config.optimizer_options, "needs an optimizer")
    own = config.optimizer is not None and config.optimizer not in ADAMS
    if own and "merge_every" in method.options:
        allowed = f"{method.name} resets moments, and how it corrects its own isn't known"
        raise InputError("optimizer", config.optimizer, allowed)
    one_count = method.optimizer in (adamw, adamw_8bit) and config.reset_how == "scale"
    if config.reset_every and one_count and config.reset_moments != "both":
        allowed = "torch's AdamW has one step count for both moments; both, or prune them"
        raise InputError("reset_moments", config.reset_moments, allowed)
    if own and (config.reset_every or config.on_refactor != "keep"):
        name = "reset_every" if config.reset_every else "on_refactor"
        allowed = f"how {config.optimizer} corrects its moments isn't known here"
        raise InputError(name, getattr(config, name), allowed)
    _check_precision(config, method)
    if config.per_layer:
        _check_per_layer(config, method)


def _check_precision(config: RunConfig, method: Method) -> None:
    """States in float32 and random rounding are for bfloat16 weights, and not every optimizer's."""
    for name, value in precision_choices(config).items():
        if "proj_type" not in method.options:
            raise InputError(name, value, f"the optimizer of {method.name} has no such choice")
        if config.precision != "bf16":
            raise InputError(name, value, f"needs precision bf16, not {config.precision}")


def _check_per_layer(config: RunConfig, method: Method) -> None:
    if not method.per_layer:
        raise InputError("per_layer", True, f"{method.name} updates its factors in pairs")
    if config.method_options.get("warm_start"):
        allowed = "which weights train changes after a warm start; without one"
        raise InputError("per_layer", True, allowed)
    if config.clip:
        allowed = "with per_layer the norm of all gradients comes too late to clip them; 0"
        raise InputError("clip", config.clip, allowed)
    if config.gradient_accumulation > 1:
        allowed = "with per_layer gradients are used up at once; 1"
        raise InputError("gradient_accumulation", config.gradient_accumulation, allowed)


def _checked_rank(config: RunConfig, method: Method) -> int | None:
    layers = _target_shapes(config.size, config.target)
    if not layers:
        raise InputError("target", config.target, "must match a linear layer of the model")
    if not method.uses_rank:
        return None
    default = method.rank or max(1, config.size.hidden_size // 4)
    rank = config.rank if config.rank is not None else default
    for name, m, n in layers:
        limit = min(m, n)
        if rank > limit:
            shape = f"{m}×{n}"
            raise InputError("rank", rank, f"must be from 1 to {limit}: {name} is {shape}")
        if method.layers is not None and name == "lm_head":
            raise InputError("target", config.target, "it matches lm_head, which stays full rank")
    return rank


@lru_cache(maxsize=128)
def _target_shapes(size: Size, target: str) -> tuple[tuple[str, int, int], ...]:
    """Name, out features and in features of each layer that `target` names."""
    with torch.device("meta"):
        model = Llama(size)
    layers = target_layers(model, target)
    return tuple((name, layer.out_features, layer.in_features) for name, layer in layers)


def _checked_options(config: RunConfig, method: Method, changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in config.method_options.items():
        if name not in method.options:
            known = nearest(name, method.options)
            raise InputError("method_options", name, f"{method.name} has no such option; {known}")
        option = method.options[name]
        if value is not None and not option.check(value):
            raise InputError(f"method_options.{name}", value, f"must be {option.allowed}")
    given = {n: v for n, v in config.method_options.items() if v is not None}
    width = config.size.hidden_size
    options = {n: at_width(o.default, width) for n, o in method.options.items()} | given
    for name, value in options.items():
        if method.options[name].real and value is not None:
            options[name] = float(value)  # 32 and 32.0 are the same run: one id
    if method.layers is not None and options["alpha"] is None:
        options["alpha"] = 32.0 if changes["init"] == "kaiming" else float(changes["rank"])
    if "merge_every" in options and "merge_every" not in given:  # short runs merge as well
        options["merge_every"] = min(options["merge_every"], max(1, config.total_steps // 5))
    for name in ("merge_every", "warm_start"):
        if options.get(name, 0) >= config.total_steps:
            allowed = f"must be below the {config.total_steps} steps of the run"
            raise InputError(f"method_options.{name}", options[name], allowed)
    return options


def build(config: RunConfig) -> tuple[Llama, torch.optim.Optimizer]:
    """The model, initialised by the seed, and its optimizer; on the CPU, in the run's weight dtype.

    Args:
        config: resolved or not.
    """
    config = resolve(config)
    model = build_model(config)
    return model, build_optimizer(model, config)


def build_model(config: RunConfig) -> Llama:
    """The model of `build` alone."""
    config = resolve(config)
    method, options = METHODS[config.method], config.method_options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Llama(config.size, config.initializer_range, config.activation_checkpointing)
        if method.layers is not None:
            assert config.rank is not None
            layer_options = {name: options[name] for name in method.layer_options}
            factorize(
                model, method.layers, rank=config.rank, target=config.target,
                init=config.init, **layer_options,
            )  # fmt: skip
    if config.precision == "bf16":
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.data = t.data.to(torch.bfloat16)  # `model.to` refuses tensors without values
    return model


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of a resolved configuration, for the model that `build_model` made."""
    targets, rest = partition(model, config.target)
    if config.method_options.get("warm_start"):  # W₀ trains first, and B and A after it
        train_dense_(model, on=True)
        targets += partition(model, config.target)[0]
    return METHODS[config.method].optimizer(targets, rest, config)


def partition(model: nn.Module, target: str) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters of the target layers, and all others: each in exactly one list.

    Biases of target layers are among the others.
    """
    of_targets = {
        id(p)
        for _, layer in target_layers(model, target)
        for name, p in layer.named_parameters(recurse=False)
        if name != "bias"
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    targets: list[Tensor] = [p for p in trainable if id(p) in of_targets]
    rest: list[Tensor] = [p for p in trainable if id(p) not in of_targets]
    if len({id(p) for p in trainable}) != len(targets) + len(rest):
        raise ValueError("target: a parameter is in two groups")
    return targets, rest
