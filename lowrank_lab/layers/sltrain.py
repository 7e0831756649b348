"""SLTrain (2406.02214): W = (α/r) · B A + S, low rank plus sparse, both trained from scratch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lowrank_lab.device import autocast_dtype
from lowrank_lab.layers.association import cast, scaled_mm, weight_gradient
from lowrank_lab.layers.base import FactorizedLinear


class SLTrainLinear(FactorizedLinear):
    """y = ((α/r) · B A + S) x + bias, with ⌊δmn⌋ trained entries of S at fixed random positions.

    The backward pass forms the weight again: only the input is saved for it.

    Args:
        linear: the dense layer to replace, whose dtype, device and bias are used.
        rank: r, from 1 to min(m, n).
        alpha: α; default 32.
        sparsity: δ, the share of trained entries of S; 0.03 in the paper, 0 for B A alone.
        init: `kaiming` draws A Kaiming-uniform(a=√5) and S uniform, both within ±1/√n; B is zero.
        keep_weight: save the weight for the backward pass instead of forming it twice: faster, but
            m·n more entries of activation memory per layer.
        generator: CPU generator of the support, which is then the same on any device; torch's
            default generator if None.

    Raises:
        ValueError: a rank, sparsity or init that is not allowed; a layer of 2³¹ entries or more.
    """

    has_other_weights: ClassVar[bool] = True

    indices: Tensor  # k = ⌊δmn⌋ flat positions i·n + j, ascending; int32
    values: nn.Parameter  # the entries of S there

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        sparsity: float = 0.03,
        init: Literal["kaiming"] = "kaiming",
        *,
        keep_weight: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        m, n = linear.out_features, linear.in_features
        alpha = 32.0 if alpha is None else alpha
        super().__init__(n, m, rank, alpha / max(rank, 1))
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity: {sparsity!r} is not allowed; from 0 to 1")
        if init != "kaiming":
            raise ValueError(f"init: {init!r} is not allowed; kaiming, as B starts at zero")
        if m * n >= 2**31:
            raise ValueError(f"linear: {m}×{n} is not allowed; int32 indices end at 2³¹ entries")
        W, count = linear.weight, math.floor(sparsity * m * n)
        self.keep_weight = keep_weight
        self.B = nn.Parameter(W.new_zeros(m, rank))
        self.A = nn.Parameter(W.new_empty(rank, n))
        self.values = nn.Parameter(W.new_empty(count))
        self.bias = linear.bias
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.uniform_(self.values, -1 / math.sqrt(n), 1 / math.sqrt(n))
        if W.is_meta or isinstance(W, FakeTensor):  # only the shape counts there
            indices = W.new_empty(count, dtype=torch.int32)
        else:
            indices = random_support(m * n, count, generator).to(W.device)
        self.register_buffer("indices", indices)

    def dense_weight(self) -> Tensor:
        """scale · B A + S, m×n."""
        return _weight(self.B, self.A, self.values, self.indices, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) → (..., m)."""
        out: Tensor = _SparsePlusLowRank.apply(  # type: ignore[no-untyped-call]
            x, self.B, self.A, self.values, self.bias,
            self.indices, self.scale, autocast_dtype(x), self.keep_weight,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparse_entries={self.values.numel()}"


def random_support(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` distinct integers in [0, size), ascending, int32; every set is equally likely.

    Draws the missing ones with replacement until none is missing. This is symmetric in the
    integers, so that every set is equally likely; memory is a few times `count`. For more than half
    of `size`, the excluded integers are drawn instead.
    """
    if 2 * count > size:
        inside = torch.ones(size, dtype=torch.bool, device="cpu")
        inside[random_support(size, size - count, generator)] = False
        return inside.nonzero().squeeze(1).int()
    found = torch.empty(0, dtype=torch.int32, device="cpu")
    while missing := count - found.numel():
        drawn = torch.randint(
            size, (missing,), generator=generator, dtype=torch.int32, device="cpu"
        )
        found = torch.unique(torch.cat([found, drawn]))  # sorted
    return found


class _SparsePlusLowRank(torch.autograd.Function):
    """Y = X Wᵀ + bias with W = scale · B A + S, saving X but not W for the backward pass.

    X (..., n) is saved before autocast casts it: layers with the same input share one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, bias: Tensor | None,
        indices: Tensor, scale: float, dtype: torch.dtype | None, keep_weight: bool,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.dtype = scale, dtype
        kept = [x, B, A, values]
        X, B, A, values = (cast(t, dtype) for t in kept)
        W = _weight(B, A, values, indices, scale)
        ctx.save_for_backward(*kept, indices, W if keep_weight else None)
        return F.linear(X, W, cast(bias, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept, indices, W = ctx.saved_tensors
        needs_x, needs_B, needs_A, needs_values, needs_bias, *_ = ctx.needs_input_grad
        dx = dB = dA = dvalues = None
        with torch.autocast(grad.device.type, enabled=False):
            B, A, values = (cast(t, ctx.dtype) for t in kept)
            dY = grad.reshape(-1, grad.shape[-1])
            if needs_B or needs_A or needs_values:  # G = dYᵀ · X, the gradient of W, once
                G = weight_gradient(dY, cast(x, ctx.dtype).reshape(-1, x.shape[-1]))
                dB = scaled_mm(ctx.scale, G, A.T) if needs_B else None  # dB = scale · G · Aᵀ
                dA = scaled_mm(ctx.scale, B.T, G) if needs_A else None  # dA = scale · Bᵀ · G
                dvalues = _entries(G, indices) if needs_values else None
                del G  # before W and dX take memory
            if needs_x:  # dX = dY · W
                dx = grad @ (_weight(B, A, values, indices, ctx.scale) if W is None else W)
        return dx, dB, dA, dvalues, dY.sum(0) if needs_bias else None, None, None, None, None


def _weight(B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
    """W (m×n) = scale · B A, then += values at the flat positions `indices`."""
    W = scaled_mm(scale, B, A)
    W.view(-1).index_add_(0, indices, values.to(W.dtype))
    return W


def _entries(G: Tensor, indices: Tensor) -> Tensor:
    """The entries of G (m×n, or its transpose's view) at the flat positions `indices` of m×n."""
    if G.is_contiguous():
        return G.view(-1).index_select(0, indices)
    m, n = G.shape
    return G.T.reshape(-1).index_select(0, indices % n * m + indices // n)
