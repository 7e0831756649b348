"""FSDP2: training with sharded weights, gradients and optimizer states.

The optimizers of this package and torch's AdamW update DTensors by themselves (`optim.base`). The
trainer adds what those need that know no DTensors (Muon, 8-bit moments, an optimizer by import
path), and full copies on rank 0.

A weight of such an optimizer has an owner, which alone stores its states and updates it as a single
process would: the weight and its gradient are gathered and the new weight is broadcast. Every
optimizer works this way, and a rank has at most one full layer at a time.

Factors are sharded by rows of B and columns of A: refactorization communicates only r×r matrices,
and a merge only A. Where the columns can't be divided evenly, A is gathered.

Checkpoints, spectra and the trained model pass through the memory of rank 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lowrank_lab import distributed
from lowrank_lab.distributed.dtensors import overwrite_
from lowrank_lab.layers import FactorizedLinear, generator_of, lora_layers
from lowrank_lab.techniques import Refactorization, refactorize_
from lowrank_lab.training.fsdp_state import ShardedState, full_gradient, placeholder


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
                overwrite_(p, updated)
                mirrored.data = placeholder(p)

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
