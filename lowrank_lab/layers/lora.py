"""LoRA (2106.09685), W = W₀ + (α/r) · B A with W₀ frozen, and ReLoRA (2307.05695), which merges.

ReLoRA's round: `merge_` puts B A into W₀ and starts new factors, `prune_moments_` (or a momentum
reset) makes Adam forget the old ones, `train_dense_` is the full-rank warm start before the first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.distributed import REPLICATED, Placement
from lowrank_lab.layers.association import autocast_dtype, linear_through_weight
from lowrank_lab.layers.base import FactorizedLinear


class LoRALinear(FactorizedLinear):
    """y = W₀ x + (α/r) · B (A x) + bias, with W₀ (m×n, the parameter `weight`) frozen.

    B starts at zero, so the layer starts as the dense layer that it replaces.

    Args:
        linear: the dense layer to replace; its weight becomes W₀ and its bias stays the bias.
        rank: r, from 1 to min(m, n).
        alpha: α; default 32.
        init: `kaiming` draws A Kaiming-uniform(a=√5), that is within ±1/√n, as LoRA and peft do.
    """

    has_other_weights: ClassVar[bool] = True

    weight: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: Literal["kaiming"] = "kaiming",
    ) -> None:
        alpha = 32.0 if alpha is None else alpha
        super().__init__(linear.in_features, linear.out_features, rank, alpha / max(rank, 1))
        if init != "kaiming":
            raise ValueError(f"init: {init!r} is not allowed; kaiming, as W₀ holds the dense init")
        W = linear.weight.detach()
        self.weight = nn.Parameter(W, requires_grad=False)
        self.B = nn.Parameter(W.new_zeros(self.out_features, rank))
        self.A = nn.Parameter(W.new_empty(rank, self.in_features))
        self.bias = linear.bias
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def dense_weight(self) -> Tensor:
        """W₀ + scale · B A, m×n. Forms the product: for tests and export."""
        return self.weight + super().dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) → (..., m), by the cheapest association; the scale acts on r channels.

        W₀ + (α/r) · B A is formed in float32 or wider only: rounding the sum to half precision
        would lose every entry of B A below 2⁻⁹ of that of W₀, again in each step.
        """
        association = self.association(x, base=True)
        dtype = autocast_dtype(x) or self.weight.dtype
        if association != "factors" and dtype.itemsize >= 4:
            return linear_through_weight(
                x, self.B, self.A, self.weight, self.bias, self.scale, association
            )
        return F.linear(x, self.weight, self.bias) + F.linear(
            F.linear(x, self.A) * self.scale, self.B
        )

    @torch.no_grad()
    def merge_(
        self, generator: torch.Generator | None = None, placement: Placement = REPLICATED
    ) -> None:
        """Put B A into W₀ and start new factors, on the same tensors; the function stays the same.

        The sum is computed in float32 or wider and rounded once, to the dtype of W₀: in bfloat16,
        entries of (α/r)·B A below 2⁻⁹ of those of W₀ are lost.

        Args:
            generator: a CPU generator that A is drawn from, so that A is the same on any device.
            placement: `Sharded` for shards that are rows of W₀ and B and columns of A.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        W, B, A = (t.to(wide) for t in (self.weight, self.B, placement.all_gather(self.A, 1)))
        # W₀ ← W₀ + (α/r) · B A
        self.weight.copy_(torch.addmm(W, B, A, alpha=self.scale))
        drawn = torch.empty(A.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.A.copy_(placement.local_shard(drawn, 1))
        self.B.zero_()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The LoRA layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def merge_(model: nn.Module, seed: int) -> list[str]:
    """ReLoRA's merge of every LoRA layer of the model, in place (`LoRALinear.merge_`).

    The new A of the i-th layer depends on `seed` and i alone: give each merge another seed, for
    instance the run's plus the step. Moments are the caller's: reset or prune them as well.

    Returns:
        The names of the merged layers.
    """
    names = []
    for index, (name, layer) in enumerate(lora_layers(model)):
        layer.merge_(generator_of(seed, index))
        names.append(name)
    return names


def train_dense_(model: nn.Module, on: bool) -> list[str]:
    """Switch the full-rank warm start on (W₀ trains, B and A don't) or off (the reverse), in place.

    What no longer trains loses its gradient, so that optimizers skip it from the next step on.

    Returns:
        The names of the layers.
    """
    names = []
    for name, layer in lora_layers(model):
        for p, trains in ((layer.weight, on), (layer.B, not on), (layer.A, not on)):
            p.requires_grad_(trains)
            if not trains:
                p.grad = None
        names.append(name)
    return names


def generator_of(seed: int, index: int) -> torch.Generator:
    """A CPU generator of its own for each pair: (1, 2) and (2, 1) are unrelated."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(63))
