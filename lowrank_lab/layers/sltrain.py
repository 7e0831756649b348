"""SLTrain (2406.02214): W = (α/r) · B A + S, low rank plus sparse, both trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.device import autocast_dtype, without_autocast
from lowrank_lab.layers.association import cast, scaled_mm, weight_gradient
from lowrank_lab.layers.base import FactorizedLinear, kaiming_
from lowrank_lab.layers.dense import dense_weight_of, is_fake_or_meta, reset_linear_
from lowrank_lab.layers.padded import zero_padded
from lowrank_lab.layers.support import Positions, plain_of, random_support


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
        generator: CPU generator of the positions, which are then the same on any device; torch's
            default generator if None. On the meta device only a seed is drawn, from which
            `to_empty` draws the positions: processes that share a model need equal generators.

    Raises:
        ValueError: a rank, sparsity or init that is not allowed; a layer of 2³¹ entries or more.
    """

    pads = True
    other_name: ClassVar[str] = "values"
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
        super().__init__(linear, rank, 32.0 if alpha is None else alpha)
        m, n = self.out_features, self.in_features
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity: {sparsity!r} is not allowed; from 0 to 1")
        if init != "kaiming":
            raise ValueError(f"init: {init!r} is not allowed; kaiming, as B starts at zero")
        if m * n >= 2**31:
            raise ValueError(f"linear: {m}×{n} is not allowed; int32 indices end at 2³¹ entries")
        W, count = dense_weight_of(linear), math.floor(sparsity * m * n)
        self.sparsity, self.keep_weight = sparsity, keep_weight
        self.B = nn.Parameter(W.new_empty(m, rank), W.requires_grad)
        self.A = nn.Parameter(W.new_empty(rank, n), W.requires_grad)
        self.values = nn.Parameter(W.new_empty(count), W.requires_grad)
        self.bias = linear.bias
        self.reset_factors()
        self._positions: Tensor | int = 0  # on the meta device: the positions, or their seed
        if is_fake_or_meta(W):  # only the shape counts there
            indices = W.new_empty(count, dtype=torch.int32)
            if W.is_meta:
                self._positions = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        else:
            indices = random_support(m * n, count, generator).to(W.device)
        self._plain = indices
        self.register_buffer("indices", indices)
        self.indices = indices

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw A and the values of S, and set B to zero, in place; the positions stay."""
        kaiming_(self.A)
        reset_linear_(self.values, None, self.in_features)
        self.B.zero_()

    def form(self, B: Tensor, A: Tensor, other: Tensor | None) -> Tensor:
        """scale · B A + S, m×n, where `other` has the values of S."""
        assert other is not None
        return _weight(B, A, other, self._plain_indices(), self.scale)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "indices" and type(value) in (Tensor, Positions):
            self._plain = plain = plain_of(value)  # compiled code takes no subclass
            marks = vars(value)  # of loaders
            value = plain.as_subclass(Positions)
            vars(value).update(marks)
        super().__setattr__(name, value)

    def _plain_indices(self) -> Tensor:
        """The positions as an ordinary tensor, with the same memory."""
        if not torch.compiler.is_compiling() and type(self.indices) is Positions:
            plain = plain_of(self.indices)
            if plain.data_ptr() != self._plain.data_ptr():  # FSDP2 exchanges the data of buffers
                self._plain = plain
            return plain
        return self._plain if torch.compiler.is_compiling() else self.indices

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_plain"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plain = self.indices
        self.indices = self.indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module, but keep the positions if `fn` (of `to_empty`) loses values.

        Positions that were on the meta device are restored, or drawn from their seed.
        """
        before = self.indices
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.indices = self.indices  # results of `fn` are ordinary tensors
        device = self.indices.device
        if device.type == "meta":
            if not before.is_meta:
                self._positions = before
        elif not before.is_meta:
            self.indices = before.to(device)
        elif isinstance(self._positions, Tensor):
            self.indices = self._positions.to(device)
        else:
            seeded = torch.Generator().manual_seed(self._positions)
            size = self.out_features * self.in_features
            self.indices = random_support(size, len(before), seeded).to(device)
        return self

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., n) → (..., m); both may have zero columns beyond, the result up to `rows`."""
        out: Tensor = _SparsePlusLowRank.apply(  # type: ignore[no-untyped-call]
            x, self.B, self.A, self.values, self.bias,
            self._plain_indices(), self.scale, autocast_dtype(x), self.keep_weight, rows,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparse_entries={self.values.numel()}"


class _SparsePlusLowRank(torch.autograd.Function):
    """Y = X Wᵀ + bias with W = scale · B A + S, saving X but not W for the backward pass.

    X (..., n) is saved before autocast casts it: layers with the same input share one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, bias: Tensor | None,
        indices: Tensor, scale: float, dtype: torch.dtype | None, keep_weight: bool,
        rows: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.dtype, ctx.rows = scale, dtype, rows
        kept = [x, B, A, values]
        X, B, A, values = (cast(t, dtype) for t in kept)
        W = zero_padded(_weight(B, A, values, indices, scale), rows, x.shape[-1])
        ctx.save_for_backward(*kept, indices, W if keep_weight else None)
        return F.linear(X, W, zero_padded(cast(bias, dtype), rows))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept, indices, W = ctx.saved_tensors
        needs_x, needs_B, needs_A, needs_values, needs_bias, *_ = ctx.needs_input_grad
        dx = dB = dA = dvalues = None
        with without_autocast(grad.device.type):
            B, A, values = (cast(t, ctx.dtype) for t in kept)
            dY = grad.reshape(-1, grad.shape[-1])
            if needs_B or needs_A or needs_values:  # G = dYᵀ · X, the gradient of W, once
                G = weight_gradient(dY, cast(x, ctx.dtype).reshape(-1, x.shape[-1]))
                G = G[: len(B), : A.shape[1]]
                dB = scaled_mm(ctx.scale, G, A.T) if needs_B else None  # dB = scale · G · Aᵀ
                dA = scaled_mm(ctx.scale, B.T, G) if needs_A else None  # dA = scale · Bᵀ · G
                dvalues = _entries(G, indices) if needs_values else None
                del G  # before W and dX take memory
            if needs_x:  # dX = dY · W
                if W is None:
                    W = _weight(B, A, values, indices, ctx.scale)
                    W = zero_padded(W, ctx.rows, x.shape[-1])
                dx = grad @ W
        dbias = dY[:, : len(B)].sum(0) if needs_bias else None
        return dx, dB, dA, dvalues, dbias, None, None, None, None, None


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
