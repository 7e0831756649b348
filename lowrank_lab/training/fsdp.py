"""FSDP2: training with sharded weights, gradients and optimizer states.

The method decides how a weight is updated (`fsdp_layout`) and what is communicated for it per step:

* Entry by entry (AdamW, SPAM, Stable-SPAM): every rank updates its shard, and states are sharded.
  Nothing is communicated but a few norms (Stable-SPAM).
* By a projection that needs no full gradient (`refresh: gram`, random): every rank updates its
  shard along the unprojected dimension; moments and projections are sharded. Communicated are the
  projection (r columns) unless it is drawn from a seed, norms of the full matrix, and at a refresh
  the p×p Gram matrix of the projected side.
* As a full matrix (SVD, orthogonalisation, pairs of factors, 8-bit blocks, uneven shapes): the
  weight and its gradient are gathered and the new weight is broadcast, three times the layer more.

At a refresh each rank solves the eigenproblem of another layer. A weight of the last kind has an
owner, which alone stores its states and updates it as a single process would. Every optimizer works
this way, each SVD is computed once, and a rank has at most one full layer at a time.

Factors are sharded by rows of B and columns of A: refactorization communicates only r×r matrices,
and a merge only A. Where the columns can't be divided evenly, both factors are gathered.

Checkpoints, spectra and the trained model pass through the memory of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from lowrank_lab import distributed
from lowrank_lab.distributed.placements import REPLICATED, Placement, Sharded
from lowrank_lab.layers import FactorizedLinear, generator_of, lora_layers
from lowrank_lab.techniques import Refactorization, refactorize_
from lowrank_lab.training.fsdp_state import (
    ShardedState,
    full_gradient,
    local_shard_of,
    placeholder,
    shard_dim_of,
    shard_view,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedModel(ShardedState):
    """A model in shards with its optimizer steps and events; arguments as for `ShardedState`."""

    @torch.no_grad()
    def step_(self) -> None:
        """One optimizer step from the model's sharded gradients."""
        for name, p in self._mirror_params.items():
            grad = self._dtensors[name].grad
            if name not in self._owner and grad is not None:
                p.grad = cast("DTensor", grad).to_local()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ranks = range(distributed.world_size())
        units = [[names for owner, names in self._units if owner == r] for r in ranks]
        for turn in range(max(map(len, units), default=0)):
            self._step_units_({r: own[turn] for r, own in enumerate(units) if turn < len(own)})

    def _step_units_(self, units: dict[int, list[str]]) -> None:
        """Gather one unit per owner, update all of them at the same time, and broadcast them."""
        me, has_gradient = distributed.rank(), False
        for owner, names in units.items():
            for name in names:
                p, mirrored = self._dtensors[name], self._mirror_params[name]
                weight, grad = p.full_tensor(), full_gradient(p)
                if owner == me and grad is not None:
                    mirrored.data, mirrored.grad = weight, grad
                    has_gradient = True
        if has_gradient:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for owner, names in units.items():
            for name in names:
                p, mirrored = self._dtensors[name], self._mirror_params[name]
                if p.grad is None:
                    continue
                updated = mirrored.data if owner == me else mirrored.new_empty(p.shape)
                dist.broadcast(updated, owner)
                local_shard_of(p).copy_(shard_view(updated, shard_dim_of(p)))
                mirrored.data = placeholder(p)

    @torch.no_grad()
    def refactorize_(self) -> Refactorization:
        """`techniques.refactorize_` of the sharded factors."""
        done, config = Refactorization([], [], []), self._config
        how = config.on_refactor, config.refactor_basis, config.refactor_above
        for name, layer in self.mirror.named_modules():
            if isinstance(layer, FactorizedLinear):
                with self._factor_placement(name, gather=("B", "A")) as placement:
                    found = refactorize_(layer, self.optimizer, *how, placement)
                for names, of_layer in zip(done, found, strict=True):
                    names.extend([name] * len(of_layer))
        return done

    @torch.no_grad()
    def merge_(self, seed: int) -> list[str]:
        """`layers.merge_` of the sharded layers."""
        names = []
        for index, (name, layer) in enumerate(lora_layers(self.mirror)):
            with self._factor_placement(name, gather=("A",)) as placement:
                layer.merge_(generator_of(seed, index), placement)
            names.append(name)
        return names

    @contextmanager
    def _factor_placement(self, layer: str, gather: Sequence[str]) -> Iterator[Placement]:
        """The placement of a layer's factors within the block.

        Sharded if A is sharded by columns; otherwise the factors in `gather` are full.
        """
        if shard_dim_of(self._dtensors[f"{layer}.A"]) == 1:
            yield Sharded(0)
        else:
            with self._full([f"{layer}.{factor}" for factor in gather]):
                yield REPLICATED
