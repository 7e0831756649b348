"""FSDP2: training with sharded weights, gradients and optimizer states.

The optimizers of this package and torch's AdamW update DTensors by themselves (`optim.base`). The
trainer adds what those need that know no DTensors (Muon, 8-bit moments, an optimizer by import
path), and full copies on rank 0.

A weight of such an optimizer has an owner, which alone stores its states and updates it as a single
process would: it receives the other ranks' shards of the weight and its gradient and sends them
the new weight. Every optimizer works this way, and a rank has at most one full layer at a time.

Factors are sharded by rows of B and columns of A: refactorization communicates only r×r matrices,
and a merge only A. Where the columns can't be divided evenly, A is gathered.

Checkpoints, spectra and the trained model pass through the memory of rank 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from lowrank_lab import distributed
from lowrank_lab.distributed.exchange import from_owners_, to_owners
from lowrank_lab.layers import FactorizedLinear, generator_of, lora_layers
from lowrank_lab.techniques import Refactorization, refactorize_
from lowrank_lab.training.fsdp_state import ShardedState, placeholder

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedModel(ShardedState):
    """A model in shards with its optimizer steps and events; arguments as for `ShardedState`."""

    @torch.no_grad()
    def step_(self) -> None:
        """One optimizer step from the model's sharded gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ranks = range(distributed.world_size())
        units = [[names for owner, names in self._units if owner == r] for r in ranks]
        for turn in range(max(map(len, units), default=0)):
            self._step_units_({r: own[turn] for r, own in enumerate(units) if turn < len(own)})

    def _step_units_(self, units: dict[int, list[str]]) -> None:
        """Gather one unit per owner, update all of them at the same time, and broadcast them."""
        trained = {
            owner: [name for name in names if self._dtensors[name].grad is not None]
            for owner, names in units.items()
        }
        weights = {r: [self._dtensors[name] for name in names] for r, names in trained.items()}
        with_gradients = {
            r: [t for p in own for t in (p, cast("DTensor", p.grad))] for r, own in weights.items()
        }
        if not any(weights.values()):
            return
        found = to_owners(with_gradients)
        mine = [self._mirror_params[name] for name in trained.get(distributed.rank(), ())]
        for mirrored, weight, grad in zip(mine, found[::2], found[1::2], strict=True):
            mirrored.data, mirrored.grad = weight, grad
        del found
        if mine:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        from_owners_(weights, [mirrored.data for mirrored in mine])
        for mirrored in mine:
            mirrored.data = placeholder(mirrored)

    @torch.no_grad()
    def refactorize_(self) -> Refactorization:
        """`techniques.refactorize_` of the sharded factors."""
        done, config = Refactorization([], [], []), self._config
        how = config.on_refactor, config.refactor_basis, config.refactor_above
        for name, layer in self.mirror.named_modules():
            if isinstance(layer, FactorizedLinear):
                with self._full(f"{name}.B", f"{name}.A"):
                    found = refactorize_(layer, self.optimizer, *how)
                for names, of_layer in zip(done, found, strict=True):
                    names.extend([name] * len(of_layer))
        return done

    @torch.no_grad()
    def merge_(self, seed: int) -> list[str]:
        """`layers.merge_` of the sharded layers."""
        names = []
        for index, (name, layer) in enumerate(lora_layers(self.mirror)):
            with self._full(f"{name}.B", f"{name}.A"):
                layer.merge_(generator_of(seed, index))
            names.append(name)
        return names
