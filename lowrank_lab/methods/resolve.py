"""`resolve`: fills in the defaults of a configuration and checks it for its method."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lowrank_lab.config import TARGETS, InputError, ResolvedConfig, RunConfig, Size, nearest
from lowrank_lab.data.prepare import vocabulary
from lowrank_lab.layers import target_layers
from lowrank_lab.layers.low_rank import usual_alpha
from lowrank_lab.methods.method import Method
from lowrank_lab.methods.optimizers import (
    ADAMS,
    adamw,
    adamw_8bit,
    import_optimizer,
    precision_choices,
)
from lowrank_lab.methods.options import at_width
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.trial import check_events, check_per_layer, check_sharded
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim.block_codes import torchao_optim
from lowrank_lab.optim.eight_bit import EIGHT_BIT

WORDS = {"no": False, "off": False, "on": True, "yes": True}  # of YAML 1.1, where a flag is meant


def resolve(config: RunConfig) -> ResolvedConfig:
    """The configuration with all defaults filled in, checked for its method.

    Fields that the method doesn't use (a rank for full-rank) become `None`, so that equal runs have
    equal ids. A technique that would have no effect is refused.

    Raises:
        InputError: an unknown method or option, a rank that doesn't fit every target layer, or a
            technique that the method can't use.
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
    changes["rank"] = _checked_rank(config, method)
    width, init = config.size.hidden_size, changes.get("init")
    changes["lr"] = config.lr or method.learning_rate(width, init)
    if config.lr is None and config.rest_lr is None and config.optimizer is None:
        changes["rest_lr"] = method.rest_rate(width, init)
    if changes.get("rest_lr", config.rest_lr) == changes["lr"]:
        changes["rest_lr"] = None
    changes["method_options"] = options = _checked_options(config, method, changes)
    if config.per_layer and options.get("error_feedback"):
        allowed = "the error buffer is as large as the gradients; False, or error_feedback=false"
        raise InputError("per_layer", True, allowed)
    if not config.reset_every or not config.reset_strength:
        changes |= {"reset_every": 0, "reset_strength": 1.0, "reset_how": "scale"}
        changes |= {"reset_moments": "both", "reset_params": "targets"}
        if not options.get("merge_every") and config.on_refactor != "reset":
            changes["recovery_steps"] = 0
    return ResolvedConfig(**{**config.model_dump(), **changes})


def _check_techniques(config: RunConfig, method: Method) -> None:
    """Refuse techniques that the method can't use, or that exclude each other."""
    dense = method.layers is None
    if config.refactor_every and not method.has_products:
        why = "no factors to refactorize" if dense else "an activation between its factors"
        raise InputError("refactor_every", config.refactor_every, f"{method.name} has {why}; 0")
    if method.init is None and config.init is not None:
        why = "no factors to initialise" if dense else "one initialisation of its factors"
        raise InputError("init", config.init, f"{method.name} has {why}")
    if config.init == "spectral" and method.layers not in (None, "low-rank"):
        allowed = f"the factors of {method.name} are added to other weights; kaiming"
        raise InputError("init", config.init, allowed)
    for name in ("on_refactor", "refactor_basis", "refactor_above"):
        value, default = getattr(config, name), RunConfig.model_fields[name].default
        if value != default and not config.refactor_every:
            raise InputError(name, value, f"needs refactor_every; or {default}")
    resets = config.reset_every and config.reset_strength and config.reset_params == "targets"
    if resets and not method.target_moments:
        allowed = f"{method.name} keeps no averages for target weights; all"
        raise InputError("reset_params", config.reset_params, allowed)
    _check_optimizer(config, method)
    _check_precision(config, method)
    if config.per_layer:
        _check_per_layer(config, method)


def _check_optimizer(config: RunConfig, method: Method) -> None:
    """Refuse an optimizer that the method, its merges or the resets can't go with."""
    if config.optimizer is not None:
        if method.optimizer is not adamw:
            allowed = f"{method.name} brings an optimizer of its own"
            raise InputError("optimizer", config.optimizer, allowed)
        import_optimizer(config.optimizer)
        for name, value in config.optimizer_options.items():
            if str(value).lower() in WORDS:  # a class would take any text for true
                allowed = "true or false, or another word for text"
                raise InputError(f"optimizer_options.{name}", value, allowed)
        if "lr" in config.optimizer_options:
            allowed = "lr is a field of the run; the schedule sets it"
            raise InputError("optimizer_options", config.optimizer_options, allowed)
    elif config.optimizer_options:
        raise InputError("optimizer_options", config.optimizer_options, "needs an optimizer")
    own = config.optimizer is not None and config.optimizer not in ADAMS
    one_count = method.optimizer in (adamw, adamw_8bit) and config.reset_how == "scale"
    if config.reset_every and one_count and not own and config.reset_moments != "both":
        allowed = "torch's AdamW has one step count for both moments; both, or prune them"
        raise InputError("reset_moments", config.reset_moments, allowed)
    if own:
        check_events(config, _merge_of(config, method))
        if config.per_layer:
            check_per_layer(config)
        if config.parallel == "fsdp2":
            check_sharded(config)


def _merge_of(config: RunConfig, method: Method) -> tuple[str, float] | None:
    """What the merges of ReLoRA do to the moments, and to which share; None without merges."""
    if "merge_every" not in method.options:
        return None
    names = ("merge_moments", "merge_share")
    how, share = (config.method_options.get(n, method.options[n].default) for n in names)
    return how, share


def _check_precision(config: RunConfig, method: Method) -> None:
    """Refuse float32 states and stochastic rounding without bfloat16 weights or a projection."""
    for name, value in precision_choices(config).items():
        if value == EIGHT_BIT:
            _check_8bit(config, method)
            continue
        if "proj_type" not in method.options:
            raise InputError(name, value, f"the optimizer of {method.name} has no such choice")
        if config.precision != "bf16":
            raise InputError(name, value, f"needs precision bf16, not {config.precision}")


def _check_8bit(config: RunConfig, method: Method) -> None:
    """Refuse moments in 8 bits where the optimizer can't store them."""
    allowed = None
    if not method.eight_bit:
        has_own = method.optimizer is adamw and method.layers is None
        allowed = f"the optimizer of {method.name} has no such choice"
        allowed += "; use the method adamw-8bit" if has_own else ""
    elif config.optimizer is not None:
        allowed = f"the states of {config.optimizer} are its own; same"
    elif method.optimizer is not adamw and config.parallel == "fsdp2":
        allowed = "with fsdp2 shards of moments would cut its blocks; same or fp32"
    else:
        try:
            torchao_optim()
        except ImportError as error:
            allowed = str(error)
    if allowed is not None:
        raise InputError("state_precision", EIGHT_BIT, allowed)


def _check_recompute(config: RunConfig) -> None:
    """Refuse CoLA-M where it can't keep narrow activations alone, or where nothing is kept."""
    field = "method_options.recompute"
    if config.activation_checkpointing:
        raise InputError(field, True, "activation_checkpointing recomputes whole blocks; False")
    targets, every = (len(_target_shapes(config.size, t)) for t in (config.target, TARGETS))
    if targets < every:
        allowed = f"target leaves {every - targets} of {every} layers of the blocks dense; False"
        raise InputError(field, True, allowed)


def _check_per_layer(config: RunConfig, method: Method) -> None:
    if not method.per_layer:
        raise InputError("per_layer", True, f"{method.name} updates its factors in pairs")
    if config.method_options.get("warm_start"):
        allowed = "a warm start changes which weights train; without one"
        raise InputError("per_layer", True, allowed)
    if config.clip:
        allowed = "with per_layer the global norm is known after the updates only; 0"
        raise InputError("clip", config.clip, allowed)
    if config.gradient_accumulation > 1:
        allowed = "with per_layer gradients are not accumulated; 1"
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
    """Name, out features and in features of each layer that `target` matches."""
    with torch.device("meta"):
        model = Llama(size)
    layers = target_layers(model, target)
    return tuple((name, layer.out_features, layer.in_features) for name, layer in layers)


def _checked_options(config: RunConfig, method: Method, changes: dict[str, Any]) -> dict[str, Any]:
    given = {n: v for n, v in config.method_options.items() if v is not None}
    for name, value in config.method_options.items():
        if name not in method.options:
            known = nearest(name, method.options)
            raise InputError("method_options", name, f"{method.name} has no such option; {known}")
        option = method.options[name]
        if option.allowed == "true or false" and str(value).lower() in WORDS:
            given[name] = value = WORDS[value.lower()]
        if value is not None and not option.check(value):
            raise InputError(f"method_options.{name}", value, f"must be {option.allowed}")
    width = config.size.hidden_size
    options = {n: at_width(o.default, width) for n, o in method.options.items()} | given
    for name, value in options.items():
        if method.options[name].real and value is not None:
            options[name] = float(value)  # 32 and 32.0 are the same run: one id
    if options.get("recompute"):
        _check_recompute(config)
    if "alpha" in options and options["alpha"] is None:
        options["alpha"] = usual_alpha(changes["init"], changes["rank"])
    if "merge_every" in options and "merge_every" not in given:  # short runs merge as well
        options["merge_every"] = min(options["merge_every"], max(1, config.total_steps // 5))
    for name in ("merge_every", "warm_start"):
        if options.get(name, 0) >= config.total_steps:
            allowed = f"must be below the {config.total_steps} steps of the run"
            raise InputError(f"method_options.{name}", options[name], allowed)
    return options
