"""One storage for the weights of layers with the same input, with zero rows up to an aligned width.

Each weight keeps its shape and is contiguous, a view of some rows of the storage. Optimizers, state
dicts and exports see nothing of it; products read the storage without copying. Whatever gives a
weight another storage (`to`, a copy of the model, sharding) ends it: then weights are joined, and
padded, in a copy for each product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_lab.kernels.operators import are_plain
from lowrank_lab.layers.padded import MULTIPLE


class Packed:
    """The storage of some weights of equal shape, if they have one. Copies have none."""

    def __init__(self) -> None:
        self._storage: Tensor | None = None

    def __bool__(self) -> bool:
        return self._storage is not None

    @torch.no_grad()
    def pack_(self, weights: Sequence[Any], aligned: bool) -> None:
        """Move the weights (m×n) into one storage.

        With `aligned`, each has zero rows after it, up to a multiple of 8. Weights of several
        shapes, dtypes or devices stay where they are.
        """
        (m, n), first = weights[0].shape, weights[0]
        kinds = {(W.shape, W.dtype, W.device) for W in weights}
        if len(kinds) > 1 or not are_plain(*weights):
            return
        rows = m + (-m % MULTIPLE if aligned else 0)
        storage = first.new_zeros(len(weights) * rows, n)
        for i, W in enumerate(weights):
            own = storage[i * rows : i * rows + m]
            own.copy_(W)
            W.data = own
        self._storage = storage

    def of(self, weights: Sequence[Any]) -> Tensor | None:
        """The storage, (m₁ + zero rows + …)×n, if these weights have it still."""
        storage = self._storage
        if storage is None or torch.compiler.is_compiling():  # which can't see where tensors are
            return None
        pointer, rows = storage.untyped_storage()._cdata, len(storage) // len(weights)
        for i, W in enumerate(weights):
            at = (W.untyped_storage()._cdata, W.storage_offset(), W.dtype, W.is_contiguous())
            if at != (pointer, i * rows * storage.shape[1], storage.dtype, True):
                self._storage = None
                return None
        return storage

    def __reduce__(self) -> Any:
        return Packed, ()
