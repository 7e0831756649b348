"""Which halves of a block are computed by one kernel, and their weights.

Shapes in this file: B = batch, T = sequence, d = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_lab.device import autocast_dtype
from lowrank_lab.kernels import flops as flops  # so that FlopCounterMode knows the kernels
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.kernels.halves import FEWEST_ROWS, MULTIPLE
from lowrank_lab.layers.padded import AlignedLinear
from lowrank_lab.models.rms_norm import RMSNorm

MOST_WEIGHTS = 2**22  # entries in a half; more have not been measured
FEWEST_SEQUENCES = 8  # threads share the work by sequences


def fused_weights(
    x: Tensor, norm: nn.Module, half: nn.Module, layers: Sequence[nn.Module]
) -> list[Tensor] | None:
    """The weights of a norm and a half's layers, if one kernel computes the half for x (B, T, d).

    That is the case for float32 on a CPU, dense layers without bias and with few weights, and as
    long as nobody follows the half or its layers by hooks. None otherwise.
    """
    if x.dim() != 3 or len(x) < FEWEST_SEQUENCES or x.shape[0] * x.shape[1] < FEWEST_ROWS:
        return None
    if autocast_dtype(x) is not None:
        return None
    if type(norm) is not RMSNorm or is_followed(norm) or is_followed(half):
        return None
    if not all(map(is_plain_linear, layers)):
        return None
    weights: list[Any] = [layer.weight for layer in (norm, *layers)]
    suits = all(n % MULTIPLE == 0 for weight in weights for n in weight.shape)
    few = sum(weight.numel() for weight in weights) <= MOST_WEIGHTS
    if not suits or not few or not kernels.are_plain(*weights):
        return None
    return weights if kernels.takes(x, *weights) else None


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether it is a dense layer without bias that its weight describes."""
    plain = type(layer) in (nn.Linear, AlignedLinear) and layer.bias is None
    return plain and not is_followed(layer)


def is_followed(module: nn.Module) -> bool:
    """Whether the module has hooks that need its own call; those of `memory.modules` don't."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(
        not getattr(hook, "only_observes", False) for found in hooks for hook in found.values()
    )
