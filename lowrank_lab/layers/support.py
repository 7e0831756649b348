"""Random positions of the sparse entries of SLTrain, and a buffer type that keeps them exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Positions(Tensor):
    """Integers that can't be averaged: copying floating-point numbers into them is a no-op.

    Averages of weights (torch's AveragedModel with `use_buffers`, and others) would otherwise
    round a p + (1 − a) p down to p − 1 for some positions.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and isinstance(args[0], cls) and args[1].is_floating_point():
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            same = func in (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
            return found.as_subclass(cls) if same else found  # results are ordinary tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        copy = self.clone().as_subclass(Positions)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Files have ordinary tensors.
        return plain_of(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def plain_of(positions: Tensor) -> Tensor:
    """The positions as an ordinary tensor, with the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return positions.as_subclass(Tensor)


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
