"""From a configuration to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.layers import (
    ColaLinear,
    LowRankLinear,
    factorize,
    target_layers,
    train_dense_,
)
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.models.block import Block
from lowrank_lab.models.llama import Llama


def build(
    config: ResolvedConfig, device: torch.device | None = None
) -> tuple[Llama, torch.optim.Optimizer]:
    """The model, initialised by the seed, and its optimizer; on the CPU, in the weights' dtype.

    Args:
        device: where a spectral start decomposes weights, one after the other; default: the CPU.
    """
    model = build_model(config, device)
    return model, build_optimizer(model, config)


def build_to_load(config: ResolvedConfig) -> Llama:
    """The model of `build` for weights that are loaded into it: without a spectral start's SVDs."""
    if config.init != "spectral":
        return build_model(config)
    model = build_model(config.override(init="kaiming"))
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            layer.init = "spectral"  # of `reset_parameters`
    return model


def build_model(config: ResolvedConfig, device: torch.device | None = None) -> Llama:
    """The model of `build` alone."""
    method, options = METHODS[config.method], config.method_options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Llama(config.size, config.initializer_range, config.activation_checkpointing)
        if method.layers is not None:
            layer_options = {name: options[name] for name in method.layer_options}
            layer_options |= {} if config.init is None else {"init": config.init}
            layer_options |= {"decompose_on": device} if config.init == "spectral" else {}
            factorize(
                model, method.layers, rank=config.method_rank, target=config.target,
                **layer_options,
            )  # fmt: skip
            _set_activations(model, options)
    if config.precision == "bf16":
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.data = t.data.to(torch.bfloat16)  # `model.to` refuses tensors without values
    return model


def _set_activations(model: Llama, options: Mapping[str, Any]) -> None:
    """CoLA's options of blocks: where an activation stands, and which are kept."""
    for block in model.model.layers:
        assert isinstance(block, Block)
        gate: nn.Module = block.mlp.gate_proj
        block.mlp.activates = not (isinstance(gate, ColaLinear) and options.get("only_lr_act"))
        block.narrow = bool(options.get("recompute"))


def build_optimizer(model: nn.Module, config: ResolvedConfig) -> torch.optim.Optimizer:
    """The optimizer for the model that `build_model` made."""
    targets, rest = partition(model, config.target)
    if config.method_options.get("warm_start"):  # W₀ trains first, and B and A after it
        train_dense_(model, on=True)
        targets += partition(model, config.target)[0]
    method = METHODS[config.method].in_precision(config.state_precision)
    optimizer = method.optimizer(targets, rest, config)
    if config.rest_lr is not None:
        _set_rest_rate(optimizer, rest, config)
    return optimizer


def _set_rest_rate(
    optimizer: torch.optim.Optimizer, rest: list[Tensor], config: ResolvedConfig
) -> None:
    """Give the groups of the rest the key `lr_ratio`, by which the schedule's rate is multiplied.

    Raises:
        InputError: the optimizer has some of the rest in a group with targets.
    """
    assert config.rest_lr is not None
    of_rest = {id(p) for p in rest}
    for group in optimizer.param_groups:
        own = [id(p) in of_rest for p in group["params"]]
        if any(own) and not all(own):
            allowed = f"{config.method} has targets and the rest in one group of parameters; none"
            raise InputError("rest_lr", config.rest_lr, allowed)
        if all(own):
            group["lr_ratio"] = config.rest_lr / config.lr


def partition(model: nn.Module, target: str) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters of the target layers, and all others; each is in exactly one list.

    Biases of target layers are among the others. Empty ones (SLTrain's sparse part of density 0)
    are left out: torch's fused optimizers don't take them on CUDA.
    """
    of_targets = {
        id(p)
        for _, layer in target_layers(model, target)
        for name, p in layer.named_parameters(recurse=False)
        if name != "bias"
    }
    trainable = [p for p in model.parameters() if p.requires_grad and p.numel()]
    targets: list[Tensor] = [p for p in trainable if id(p) in of_targets]
    rest: list[Tensor] = [p for p in trainable if id(p) not in of_targets]
    if len({id(p) for p in trainable}) != len(targets) + len(rest):
        raise ValueError("target: a parameter is in two groups")
    return targets, rest
