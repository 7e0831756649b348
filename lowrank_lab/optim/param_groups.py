"""Parameter groups of a model: the matrices that a method projects, and everything else."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lowrank_lab.config import TARGETS
from lowrank_lab.layers.base import FactorizedLinear
from lowrank_lab.layers.targets import LINEAR, describe_layers, heads, matching_layers
from lowrank_lab.optim.checks import require, require_int

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def param_groups(
    model: nn.Module,
    *,
    rank: int,
    target: str = TARGETS,
    weight_decay: float = 0.0,
    skip_small: bool = False,
    **keys: Any,
) -> list[dict[str, Any]]:
    """Groups for the optimizers of this package; each trainable parameter is in exactly one.

    The first group has `rank`, `keys` and the matrices (m×n) of the target layers: weights of
    linear layers and of transformers' Conv1D, or the factors B, A of factorised layers. The second
    has all other parameters: embeddings, the head, norms, biases. If `weight_decay` > 0, a third
    group without decay has the 1-D parameters, biases and norms, as is customary.

    Args:
        model: any module. Parameters that don't require a gradient are left out.
        rank: r of the first group.
        target: regular expression, searched in the full name of each layer; or `all-linear`, every
            linear layer except the head and those that share their weight (`layers.targets.heads`).
        weight_decay: of the first two groups. 0 sets no key: the optimizer's own value applies.
        skip_small: put matrices with a side shorter than the rank into the second group.
        keys: further keys of the first group (`update_proj_gap`, `scale`, …).

    Returns:
        Groups with `params` and, in the same order, `param_names`; none of them is empty.

    Raises:
        ValueError: no layer matches, a matrix has a side shorter than the rank (without
            `skip_small`), or `rank` or `weight_decay` is out of range.
    """
    require_int("rank", rank, 1)
    require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
    ranked = _target_matrices(model, target)
    small = [
        f"{name} {tuple(p.shape)}"
        for name, p in model.named_parameters()
        if id(p) in ranked and min(p.shape) < rank
    ]
    allowed = "at most the smaller side of each matrix; pass skip_small=True to leave out "
    require("rank", rank, skip_small or not small, allowed + _first(small))
    groups: list[dict[str, Any]] = [{"rank": rank, **keys}, {}, {}]
    decays, undecayed = weight_decay > 0, _undecayed(model)
    for group, decay in zip(groups, (weight_decay, weight_decay, 0.0), strict=True):
        group |= {"params": [], "param_names": []} | ({"weight_decay": decay} if decays else {})
    for name, p in model.named_parameters():
        if p.requires_grad:
            projected = id(p) in ranked and min(p.shape) >= rank
            group = groups[0 if projected else 2 if decays and id(p) in undecayed else 1]
            group["params"].append(p)
            group["param_names"].append(name)
    require("rank", rank, bool(groups[0]["params"]), f"one that fits: {_first(small)}")
    return [group for group in groups if group["params"]]


def scale_groups(model: nn.Module, momentum: float = 0.9) -> list[dict[str, Any]]:
    """Groups for `Scale`; each trainable parameter is in exactly one.

    Embeddings have `norm_dim` 0, the weights of nn.Linear and its subclasses 1, and those of the
    heads (`layers.targets.heads`) `momentum` as well. All other parameters are plain AdamW: norms,
    biases, factors. A head that shares the matrix of an embedding is an embedding, as in the
    authors' code.

    Args:
        model: any module. Parameters that don't require a gradient are left out.
        momentum: of the heads.

    Returns:
        Groups with `params` and, in the same order, `param_names`; none of them is empty.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    of_heads = {id(m) for m in heads(model, layers)}
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    numbers = {id(m.weight): 0 for m in embeddings}
    for _, layer in layers:
        numbers.setdefault(id(layer.weight), 2 if id(layer) in of_heads else 1)
    of_head = {"norm_dim": 1, "momentum": momentum}
    keys: list[dict[str, Any]] = [{"norm_dim": 0}, {"norm_dim": 1}, of_head, {}]
    groups: list[dict[str, Any]] = [{"params": [], "param_names": [], **own} for own in keys]
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = groups[numbers.get(id(p), 3)]
            group["params"].append(p)
            group["param_names"].append(name)
    return [group for group in groups if group["params"]]


def _target_matrices(model: nn.Module, target: str) -> set[int]:
    """Ids of the trainable matrices of the target layers, biases left out."""
    kinds = (*LINEAR, *_conv1d())
    layers = list(matching_layers(model, target, kinds))
    allowed = f"it matches no linear layer; {describe_layers(model, kinds)}"
    require("target", target, bool(layers), allowed)
    found: dict[int, Tensor] = {
        id(p): p for _, layer in layers for p in layer.parameters() if p.requires_grad
    }
    matrices = {i for i, p in found.items() if p.ndim == 2}
    require("target", target, bool(matrices), f"{layers[0][0]} has no trainable matrix")
    return matrices


def _conv1d() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D, a linear layer with its weight transposed, if it has been imported."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if found is None else (found,)


def _undecayed(model: nn.Module) -> set[int]:
    """Ids of 1-D parameters, biases and norms; SLTrain's sparse entries are part of a matrix."""
    return {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(module, NORMS)
        or name == "bias"
        or (p.ndim < 2 and not isinstance(module, FactorizedLinear))
    }


def _first(names: list[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
