"""The dense weight of a factorised layer for code that reads `layer.weight`, as of an nn.Linear.

The tensor knows its shape, dtype and device, and forms the product only when something computes
with it. Gradients flow into the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from lowrank_lab.device import without_autocast

aten = torch.ops.aten

# Methods that read a tensor's memory without going through torch's dispatcher.
READ_DIRECTLY = frozenset(
    "numpy tolist __array__ __dlpack__ __reduce_ex__ __deepcopy__ __repr__ __format__ data_ptr "
    "untyped_storage storage".split()
)


class Formable(Protocol):
    """A layer with factors B and A and, in some kinds, a third tensor."""

    other_name: ClassVar[str]
    B: Any
    A: Any

    def other(self) -> Tensor | None: ...
    def form(self, B: Tensor, A: Tensor, other: Tensor | None) -> Tensor: ...
    def oriented(self, W: Tensor) -> Tensor: ...
    def weight_shape(self) -> tuple[int, int]: ...


class DenseWeight(Tensor):
    """The weight of a layer, formed when it is used; it can't be written to."""

    layer: Formable
    parts: tuple[Tensor, Tensor, Tensor | None]  # of which it is formed
    versions: tuple[int, ...]

    @staticmethod
    def of(layer: Formable) -> Tensor:
        """The weight of a layer, connected to the layer's parameters for autograd."""
        found: Tensor = _Connected.apply(  # type: ignore[no-untyped-call]
            layer, layer.B, layer.A, layer.other()
        )
        return found

    @staticmethod
    def detached(layer: Formable, *parts: Any) -> DenseWeight:
        """The weight of a layer with these B, A and other, without gradient."""
        B = parts[0]
        found: DenseWeight = Tensor._make_wrapper_subclass(
            DenseWeight, layer.weight_shape(), dtype=B.dtype, device=B.device
        )
        found.layer, found.parts = layer, parts
        found.versions = _versions(parts)
        return found

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether transformers has loaded all factors; it then doesn't initialise `weight`."""
        parts = (p for p in self.parts if p is not None)
        return all(getattr(p, "_is_hf_initialized", False) for p in parts)

    def formed(self) -> Tensor:
        """The product as an ordinary tensor, in the dtype of the factors."""
        layer, parts = self.layer, self.parts
        if torch._C._current_graph_task_id() >= 0 and self.versions != _versions(parts):
            raise RuntimeError(
                f"weight: of {type(layer).__name__}, a factor has been changed in place between "
                "the forward and the backward pass"
            )
        with without_autocast(parts[0].device.type):
            return layer.oriented(layer.form(*parts)).to(parts[0].dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READ_DIRECTLY:
            args, kwargs = tree_map_only(cls, cls._formed_like, (args, kwargs))
        elif name in ("__set__", "__setitem__", "requires_grad_") and isinstance(args[0], cls):
            raise _refusal(args[0], name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls.detached(args[0].layer, *args[0].parts)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), cls):
                raise _refusal(given[argument.name], func._schema.name)
        args, kwargs = tree_map_only(cls, cls.formed, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _formed_like(weight: DenseWeight) -> Tensor:
        """The product, with a gradient if the weight has one."""
        with torch.set_grad_enabled(weight.requires_grad and torch.is_grad_enabled()):
            return weight.formed()


def _versions(parts: Sequence[Any]) -> tuple[int, ...]:
    """How often each of these tensors has been changed in place."""
    return tuple(0 if p is None or p.is_inference() else p._version for p in parts)


def _refusal(weight: DenseWeight, what: str) -> ValueError:
    kind = type(weight.layer).__name__
    return ValueError(
        f"weight: writing to it ({what}) is not allowed; in {kind} it is computed: change B, A"
        f"{' or ' + weight.layer.other_name if weight.layer.other_name else ''}"
    )


class _Connected(torch.autograd.Function):
    """Parameters → DenseWeight; the gradient of W is passed on to the parameters."""

    @staticmethod
    def forward(ctx: Any, layer: Formable, *parts: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*parts)
        return DenseWeight.detached(layer, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        parts = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad(), without_autocast(G.device.type):
            W = ctx.layer.oriented(ctx.layer.form(*parts))
        wanted = [p for p, need in zip(parts, needs, strict=True) if p is not None and need]
        grads = iter(torch.autograd.grad(W, wanted, G))
        return None, *(next(grads) if need else None for need in needs)
