"""The base class of factorised layers: W (out×in) = scale · B @ A (+ W₀ or S).

Shapes in this package: m = out features, n = in features, r = rank; B is m×r, A is r×n.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank_lab.layers.association import Association, cheapest
from lowrank_lab.layers.dense import check_weight, dense_weight_of, is_conv1d, reset_linear_
from lowrank_lab.layers.dense_weight import DenseWeight


class FactorizedLinear(nn.Module):
    """A linear layer with weight `scale · B @ A`; the factors are parameters `B` and `A`.

    Args:
        linear: the dense layer to replace: an nn.Linear, or a Conv1D of transformers.
        rank: r, from 1 to min(m, n).
        alpha: α; the scale is α/r.

    Raises:
        ValueError: a rank that does not fit, or a weight that is not real floating point.
    """

    other_name: ClassVar[str] = ""  # the parameter beside scale · B A, if any
    has_other_weights: ClassVar[bool] = False  # whether W has a part beside scale · B A
    has_dense_weight: ClassVar[bool] = True  # whether there is a W that computes the same

    B: nn.Parameter
    A: nn.Parameter
    bias: nn.Parameter | None
    carried: tuple[str, ...] = ()  # attributes of the replaced layer, by `factorize`

    def __init__(self, linear: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        W = dense_weight_of(linear)
        check_weight(W)
        self.out_features, self.in_features = W.shape
        if not 1 <= rank <= min(W.shape):
            limit, shape = min(W.shape), f"{self.out_features}×{self.in_features}"
            raise ValueError(f"rank: {rank} is not allowed; a {shape} layer takes 1 to {limit}")
        self.rank, self.scale = rank, alpha / rank
        self.training = linear.training
        # Conv1D stores its weight as in×out. `weight` has the same shape, and `to_dense_` makes a
        # Conv1D again.
        self.dense_class = type(linear)
        self.transposed = is_conv1d(linear)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The parameters B (m×r) and A (r×n), without the scale."""
        return self.B, self.A

    def other(self) -> Tensor | None:
        """The parameter beside the factors: W₀, the values of S, or None."""
        return getattr(self, self.other_name) if self.other_name else None

    def form(self, B: Tensor, A: Tensor, other: Tensor | None) -> Tensor:
        """W (m×n) from the given parameters."""
        return self.scale * (B @ A)

    def dense_weight(self) -> Tensor:
        """W (m×n), with the scale. Forms the product."""
        return self.form(self.B, self.A, self.other())

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (m×n), computed in float64 and rounded once; by default to the dtype of the factors."""
        other = self.other()
        wide = None if other is None else other.double()
        return self.form(self.B.double(), self.A.double(), wide).to(dtype or self.B.dtype)

    @property
    def weight(self) -> Tensor:
        """W as `weight` of the replaced layer: m×n, or n×m for a Conv1D.

        For code that reads `layer.weight`. Reading its shape, dtype or device costs nothing. An
        operation on it forms the product, and the gradient flows to the factors. Writes are
        refused, and a row or another view of it is a copy: change `B`, `A` and, for LoRA,
        `base_weight`.
        """
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return self.oriented(self.dense_weight())
        return DenseWeight.of(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module does; refused for `weight`, which is computed."""
        if name == "weight":
            computed = f"in {type(self).__name__} it is computed"
            why = computed if self.has_dense_weight else refusal_of(self)
            raise ValueError(f"weight: setting it is not allowed; {why}")
        super().register_parameter(name, param)

    def oriented(self, W: Tensor) -> Tensor:
        """W (m×n) as `weight` of the replaced layer."""
        return W.T if self.transposed else W

    def weight_shape(self) -> tuple[int, int]:
        """The shape of `weight`."""
        m, n = self.out_features, self.in_features
        return (n, m) if self.transposed else (m, n)

    def reset_parameters(self) -> None:
        """Draw all parameters as at construction, in place; needed after `to_empty`.

        The bias, and W₀ of a LoRA layer, are drawn as nn.Linear draws them (within ±1/√n). Load
        trained values afterwards.
        """
        with torch.no_grad():
            reset_linear_(None, self.bias, self.in_features)
        self.reset_factors()

    def reset_factors(self) -> None:
        """Draw the factors (and the values of S) as at construction, in place."""
        raise NotImplementedError

    def association(self, x: Tensor, *, base: bool = False) -> Association:
        """The cheapest order of products for an input x (..., n); `base`: with a dense W₀."""
        tokens = x.numel() // x.shape[-1]
        trains = self.B.requires_grad or self.A.requires_grad
        return cheapest(
            tokens, self.out_features, self.in_features, self.rank, base=base, trains=trains
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scale={self.scale:g}, bias={self.bias is not None}"
        )


def kaiming_(factor: Tensor, generator: torch.Generator | None = None) -> None:
    """Draw a factor Kaiming-uniform(a=√5), i.e. within ±1/√columns, in place."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)


def refusal_of(layer: FactorizedLinear) -> str:
    """Why a layer without a dense weight can't do what needs one."""
    return f"{type(layer).__name__} has an activation between its factors, and no dense weight"


def require_dense_weights(model: nn.Module, field: str = "model") -> None:
    """Refuse layers without a dense weight: no matrix computes the same, nor do other factors.

    Raises:
        ValueError: the name of the first one.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear) and not layer.has_dense_weight:
            shown = repr(name) if name else "the layer"
            raise ValueError(f"{field}: {shown} is not allowed; {refusal_of(layer)}")


def require_own_parameters(model: nn.Module) -> None:
    """Refuse factorised layers that share a parameter: a change of one would change the other.

    Raises:
        ValueError: the names of the layers.
    """
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            for p in (*layer.factors(), layer.other()):
                owner = name if p is None else owners.setdefault(id(p), name)
                if owner != name:
                    allowed = f"it shares a factor with {owner}"
                    raise ValueError(f"model: {name} is not allowed; {allowed}")
