"""Which halves of a block are computed by one kernel, and their weights.

Shapes in this file: B = batch, T = sequence, d = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lowrank_lab.device import autocast_dtype
from lowrank_lab.kernels import flops as flops  # so that FlopCounterMode knows the kernels
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.kernels.halves import MULTIPLE
from lowrank_lab.layers.padded import AlignedLinear
from lowrank_lab.models.rms_norm import RMSNorm

MOST_WEIGHTS = 2**18  # entries in a half; with more, its weights leave a core's cache
FEWEST_SEQUENCES = 8  # threads share the work by sequences


def fused_weights(x: Tensor, norm: nn.Module, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """The weights of a half's norm and layers, if one kernel can compute it for x (B, T, d).

    That is the case for float32 on a CPU, small dense layers without bias, and as long as nobody
    follows single layers by hooks. None otherwise.
    """
    if x.dim() != 3 or len(x) < FEWEST_SEQUENCES or autocast_dtype(x) is not None:
        return None
    if type(norm) is not RMSNorm or not all(map(_is_plain, layers)) or _is_followed(norm):
        return None
    weights: list[Any] = [layer.weight for layer in (norm, *layers)]
    suits = all(n % MULTIPLE == 0 for weight in weights for n in weight.shape)
    few = sum(weight.numel() for weight in weights) <= MOST_WEIGHTS
    if not suits or not few or not all(type(w) in TENSORS for w in weights):
        return None
    return weights if kernels.takes(x, *weights) else None


TENSORS = (Tensor, nn.Parameter, FakeTensor)  # others may compute products in their own way


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a dense layer without bias that its weight describes."""
    plain = type(layer) in (nn.Linear, AlignedLinear) and layer.bias is None
    return plain and not _is_followed(layer)


def _is_followed(layer: nn.Module) -> bool:
    """Whether the layer has hooks that need its own call; those of `memory.modules` don't."""
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks,
        layer._backward_hooks, layer._backward_pre_hooks,
    )  # fmt: skip
    return any(
        not getattr(hook, "only_observes", False) for found in hooks for hook in found.values()
    )
