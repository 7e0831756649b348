"""Updates of DTensors, the parameters of FSDP2 and tensor parallelism, by optimizers for tensors.

An optimizer names the dimension along which it can update a matrix in shards (`shard_dim`). Each
rank then updates its own shard, and stores its shard of the states. Where a parameter is sharded
along the other dimension, its gradient and weight are redistributed before the update and the
weight after it (all-to-all, 3·m·n/ranks entries per rank and step). Matrices that can't be updated
in shards are gathered on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import ANY_DIM, ShardLayout, is_dtensor, layout_of
from lowrank_lab.distributed.placements import REPLICATED, Placement


class DTensorOptimizer(torch.optim.Optimizer):
    """An optimizer whose updates work on plain tensors, local parts of DTensors included."""

    marker: ClassVar[str] = "rank"  # the key of the groups that the method updates
    # The parameter that is being updated, and how the processes share its update.
    param: Tensor
    layout: ShardLayout | None = None
    placement: Placement = REPLICATED
    refreshed: dict[Tensor, Any]  # new projections of DTensors, within a step

    def acts_on(self, group: dict[str, Any]) -> bool:
        """Whether the method updates the parameters of a group; all others are plain AdamW."""
        return self.marker in group

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        """The dimension along which a DTensor of `group` is updated in shards; None: not at all.

        `update_` then receives local shards of W, G and the moments, and uses `self.placement` for
        everything that depends on the full matrix. ANY_DIM means that the update is elementwise.
        None (default): `update_` needs the full matrix, which all ranks gather.
        """
        return None

    def dim_of(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        """`shard_dim` of any group; groups of plain AdamW are updated elementwise."""
        return self.shard_dim(group, shape) if self.acts_on(group) else ANY_DIM

    @torch.no_grad()
    def place_states_(self) -> None:
        """Shard the states of DTensors as their updates need them, e.g. after loading full ones."""
        for group in self.param_groups:
            for p in filter(is_dtensor, group["params"]):
                layout = layout_of(p, self.dim_of(group, p.shape))
                layout.place_states_(self.state.get(p, {}))

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Work shared between several DTensors, before `update_` of each."""

    @contextmanager
    def plain_parts(
        self, p: Tensor, dim: int | None
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """W, G and the state of p as plain tensors, which the block changes in place.

        They are those of p itself, or of a DTensor's layout (`layout_of`).
        """
        assert p.grad is not None
        state, layout = self.state[p], layout_of(p, dim) if is_dtensor(p) else None
        self.param, self.layout = p, layout
        self.placement = REPLICATED if layout is None else layout.placement
        if layout is None:
            yield p, p.grad, state
            return
        W, G, parts = layout.load(), layout.gradient(), layout.load_states(state)
        yield W, G, parts
        layout.store_states_(state, parts)
        layout.write_(W)


def param_index(optimizer: torch.optim.Optimizer, p: Tensor) -> int:
    """The number, from 1, of a parameter among all parameters of the optimizer."""
    # One search for all parameters: a search for each would be quadratic in their number.
    sizes = tuple(len(group["params"]) for group in optimizer.param_groups)
    known_sizes, known = optimizer.__dict__.get("_indices", ((), {}))
    if sizes != known_sizes or p not in known:
        params = (q for group in optimizer.param_groups for q in group["params"])
        known = {q: i for i, q in enumerate(params, 1)}
        optimizer.__dict__["_indices"] = sizes, known
    index: int = known[p]
    return index
