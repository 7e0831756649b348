"""Linear layers with a factorised weight, W = scale · B A (+ W₀ or S), for any model.

`factorize` replaces the nn.Linear layers of a model; each kind of layer is one file.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from lowrank_lab.config import TARGETS, nearest
from lowrank_lab.layers.balance import Balance, balance, imbalance, product_singular_values
from lowrank_lab.layers.base import FactorizedLinear
from lowrank_lab.layers.lora import LoRALinear, generator_of, lora_layers, merge_, train_dense_
from lowrank_lab.layers.low_rank import LowRankLinear
from lowrank_lab.layers.sltrain import SLTrainLinear
from lowrank_lab.layers.targets import target_layers

__all__ = [
    "KINDS",
    "Balance",
    "FactorizedLinear",
    "LoRALinear",
    "LowRankLinear",
    "SLTrainLinear",
    "balance",
    "factorize",
    "generator_of",
    "imbalance",
    "lora_layers",
    "merge_",
    "product_singular_values",
    "target_layers",
    "train_dense_",
]

Model = TypeVar("Model", bound=nn.Module)

KINDS: dict[str, type[Any]] = {
    "low-rank": LowRankLinear,
    "lora": LoRALinear,
    "sltrain": SLTrainLinear,
}


def factorize(
    model: Model, kind: str = "low-rank", *, rank: int, target: str = TARGETS, **options: Any
) -> Model:
    """Replace each nn.Linear that matches `target` by a factorised layer, in place.

    Args:
        model: any module; layers that are not nn.Linear stay as they are.
        kind: one of `KINDS`: low-rank | lora | sltrain.
        rank: r, at most min(m, n) of every layer that matches.
        target: regular expression, searched in the full name of each layer; or `all-linear`, every
            layer but the head and those that share their weight (`targets.heads`).
        options: further arguments of the layer (`alpha`, `init`, …).

    Returns:
        The same model.

    Raises:
        ValueError: an unknown kind, a pattern that matches nothing, a rank too large, a layer that
            shares its weight with another module. The model is then unchanged.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not allowed; {nearest(kind, KINDS)}")
    found = [(n, m) for n, m in target_layers(model, target) if type(m) is nn.Linear]
    if model in [m for _, m in found]:
        raise ValueError("model: a bare linear layer can't be replaced in place")
    if not found:
        raise ValueError(f"target: {target!r} matches no linear layer of the model")
    replaced = [
        (name, KINDS[kind](_unshared(model, name, linear), rank=rank, **options))
        for name, linear in found
    ]
    for name, layer in replaced:
        model.set_submodule(name, layer)
    return model


def _unshared(model: nn.Module, name: str, linear: nn.Linear) -> nn.Linear:
    """The layer; refused if it shares its weight: factors can't stay tied to another module."""
    for other_name, other in model.named_modules(remove_duplicate=False):
        shared = any(p is linear.weight for p in other.parameters(recurse=False))
        if shared and other_name != name:
            raise ValueError(f"target: {name} shares its weight with {other_name}; exclude it")
    return linear
