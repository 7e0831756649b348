"""LoRA (2106.09685), W = W₀ + (α/r) · B A with W₀ frozen, and ReLoRA (2307.05695), which merges.

One round of ReLoRA: `merge_` adds B A to W₀ and draws new factors, and `prune_moments_` (or a
momentum reset) removes Adam's moments of the old ones. `train_dense_` is the full-rank warm start
before the first round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowrank_lab.device import autocast_dtype
from lowrank_lab.distributed.dtensors import full_tensor, joint_parts, overwrite_, reshard_
from lowrank_lab.layers.association import linear_through_weight
from lowrank_lab.layers.base import FactorizedLinear, kaiming_, require_own_parameters
from lowrank_lab.layers.dense import dense_weight_of, reset_linear_
from lowrank_lab.layers.padded import padded_linear


class LoRALinear(FactorizedLinear):
    """y = W₀ x + (α/r) · B (A x) + bias, with W₀ (m×n, the parameter `base_weight`) frozen.

    B starts at zero, so that the new layer computes the same as the dense layer. State dicts of
    earlier versions, which call W₀ `weight`, still load.

    Args:
        linear: the dense layer to replace; the layer takes over its weight as W₀, and its bias.
        rank: r, from 1 to min(m, n).
        alpha: α; default 32.
        init: `kaiming` draws A Kaiming-uniform(a=√5), i.e. within ±1/√n, as LoRA and peft do.
    """

    other_name: ClassVar[str] = "base_weight"
    has_other_weights: ClassVar[bool] = True

    pads = True
    base_weight: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        init: Literal["kaiming"] = "kaiming",
    ) -> None:
        super().__init__(linear, rank, 32.0 if alpha is None else alpha)
        if init != "kaiming":
            raise ValueError(f"init: {init!r} is not allowed; kaiming, as W₀ has the dense init")
        W = dense_weight_of(linear).detach().contiguous()
        self.base_weight = nn.Parameter(W, requires_grad=False)
        self.B = nn.Parameter(W.new_zeros(self.out_features, rank))
        self.A = nn.Parameter(W.new_empty(rank, self.in_features))
        self.bias = linear.bias
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw A Kaiming-uniform(a=√5) and set B to zero, in place; W₀ stays."""
        kaiming_(self.A)
        self.B.zero_()

    def reset_parameters(self) -> None:
        """Draw W₀ and the bias as nn.Linear does, and the factors as at construction, in place."""
        with torch.no_grad():
            reset_linear_(self.base_weight, None, self.in_features)
        super().reset_parameters()

    def form(self, B: Tensor, A: Tensor, other: Tensor | None) -> Tensor:
        """W₀ + scale · B A, m×n."""
        assert other is not None
        return other + super().form(B, A, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        old, new = f"{prefix}weight", f"{prefix}base_weight"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., n) → (..., m), by the cheapest association; the scale acts on r channels.

        x and the result may have zero columns beyond n and m, the result up to `rows`.
        W₀ + (α/r) · B A is formed in float32 or wider only: rounding the sum to half precision
        would lose, at every step, all entries of (α/r) · B A smaller than 2⁻⁹ times those of W₀.
        """
        padded = rows is not None or x.shape[-1] > self.in_features  # in half precision
        if padded or self.goes_through_factors(x):
            return self.outer(x, padded_linear(x, self.A, None), rows)
        how = self.association(x, base=True)
        return linear_through_weight(
            x, self.B, self.A, self.base_weight, self.bias, self.scale, how
        )

    def goes_through_factors(self, x: Tensor) -> bool:
        """Whether `outer` of A x is the layer's result for x."""
        dtype = autocast_dtype(x) or self.base_weight.dtype
        return dtype.itemsize < 4 or self.association(x, base=True) == "factors"

    def outer(self, x: Tensor, h: Tensor, rows: int | None = None) -> Tensor:
        """As `forward`, from A x (..., r)."""
        return padded_linear(x, self.base_weight, self.bias, rows) + padded_linear(
            h * self.scale, self.B, None, rows
        )

    @torch.no_grad()
    def merge_(self, generator: torch.Generator | None = None) -> None:
        """Add (α/r) · B A to W₀, draw A again and set B to zero, in place; W stays the same.

        The sum is computed in float32 or wider and rounded once, to the dtype of W₀: in bfloat16,
        entries of (α/r) · B A smaller than 2⁻⁹ times those of W₀ are lost. With DTensors (FSDP2),
        each rank merges its rows; only A is gathered.

        Args:
            generator: CPU generator of the new A, so that A is the same on any device.
        """
        wide = torch.promote_types(self.base_weight.dtype, torch.float32)
        A = full_tensor(self.A)
        with joint_parts((self.base_weight, 0), (self.B, 0)) as ((W, B), _):
            # W₀ ← W₀ + (α/r) · B A
            W.copy_(torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=self.scale))
            B.zero_()
        drawn = torch.empty(A.shape, dtype=torch.float32, device="cpu")
        kaiming_(drawn, generator)
        overwrite_(self.A, drawn.to(A.dtype))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Names and modules of the LoRA layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def merge_(model: nn.Module, seed: int) -> list[str]:
    """ReLoRA's merge of every LoRA layer of a model, in place (`LoRALinear.merge_`).

    The new A of the i-th layer depends only on `seed` and i: use another seed for each merge, e.g.
    the run's seed plus the step. Moments are not changed: reset or prune them as well.

    Source: 2307.05695.

    Returns:
        The names of the merged layers; none of a model without LoRA layers.

    Raises:
        ValueError: two layers share a parameter. Nothing has changed then.
    """
    require_own_parameters(model)
    reshard_(model)
    names = []
    for index, (name, layer) in enumerate(lora_layers(model)):
        layer.merge_(generator_of(seed, index))
        names.append(name)
    return names


def train_dense_(model: nn.Module, on: bool) -> list[str]:
    """Switch a full-rank warm start on (W₀ trains, B and A don't) or off (the reverse), in place.

    Gradients of frozen parameters are removed, so that optimizers skip these from the next step on.

    Returns:
        The names of the layers.
    """
    names = []
    for name, layer in lora_layers(model):
        for p, trains in ((layer.base_weight, on), (layer.B, not on), (layer.A, not on)):
            p.requires_grad_(trains)
            if not trains:
                p.grad = None
        names.append(name)
    return names


def current_name(name: str) -> str:
    """The name of a parameter that is called `name` in an old checkpoint: W₀ was `weight`."""
    module, _, last = name.rpartition(".")
    return f"{module}.base_weight" if last == "weight" else name


def generator_of(seed: int, index: int) -> torch.Generator:
    """A CPU generator for each pair of seed and index; different pairs give unrelated streams."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(63))
