"""Which halves of a block are computed by one kernel, and their weights.

Shapes in this file: B = batch, T = sequence, d = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from lowrank_lab.device import autocast_dtype
from lowrank_lab.kernels import flops as flops  # so that FlopCounterMode knows the kernels
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.kernels.halves import FEWEST_ROWS, MULTIPLE
from lowrank_lab.layers.padded import AlignedLinear
from lowrank_lab.models.rms_norm import RMSNorm

MOST_WEIGHTS = 2**22  # entries in a half; more have not been measured
FEWEST_SEQUENCES = 8  # threads share the work by sequences
ON_ALL_MODULES = (  # hooks
    all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks,
    all_modules._global_backward_hooks, all_modules._global_backward_pre_hooks,
)  # fmt: skip


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
    few = sum(weight.numel() for weight in weights) <= MOST_WEIGHTS
    return weights if few and _fit(x, weights) and kernels.takes(x, *weights) else None


def _fit(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether weights (d), (f×d) of all layers but the last, and (d×f) fit x (..., d).

    Both widths have to suit the kernels; of attention they are equal.
    """
    d, f = x.shape[-1], len(weights[1])
    shapes = [(d,), *(len(weights) - 2) * [(f, d)], (d, f)]
    if len(weights) == 5 and f != d:
        return False
    fit = all(weight.shape == shape for weight, shape in zip(weights, shapes, strict=True))
    return fit and d % MULTIPLE == 0 == f % MULTIPLE


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether it is a dense layer without bias that its weight describes."""
    plain = type(layer) in (nn.Linear, AlignedLinear) and layer.bias is None
    return plain and not is_followed(layer)


def is_followed(module: nn.Module) -> bool:
    """Whether the module's own call is needed: a `forward` of its own, or hooks on it or on all.

    Hooks of `memory.modules` don't need it.
    """
    if "forward" in vars(module):
        return True
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks, *ON_ALL_MODULES,
    )  # fmt: skip
    return any(
        not getattr(hook, "only_observes", False) for found in hooks for hook in found.values()
    )
