"""A sharded model, the mirror for its optimizer, and conversion from and to a full model.

torch's `fully_shard` shards the model: weights are gathered block by block while they compute, and
gradients arrive averaged and sharded. The optimizer's parameters are those of the *mirror*, a copy
of the model's modules: the sharded weights themselves, or a placeholder for a weight that has an
owner (`fsdp_layout`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.distributed.dtensors import local_part, overwrite_, shard_as
from lowrank_lab.distributed.exchange import gathered
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.methods.build import (
    build,
    build_model,
    build_optimizer,
    build_to_load,
)
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.training.fsdp_layout import assign_owners, column_sharded, names_needing_owners

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedState:
    """A model in shards, its mirror, and the optimizer of the mirror.

    Args:
        config: of the run.
        device: of this rank, which has joined the process group.

    Raises:
        InputError: more ranks than layers that are updated as full matrices.
    """

    def __init__(self, config: ResolvedConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self.model = build_model(config, device)
        if device.type != "cpu":  # fake tensors can't be moved, and are on the CPU
            self.model.to(device)
        self.mirror = _mirror_of(self.model)
        trial = build_optimizer(self.mirror, config)  # of the placeholders: it has no states yet
        owned = names_needing_owners(self.model, trial, config)
        self._fully_shard(column_sharded(self.mirror, trial, owned))
        self._dtensors = {n: cast("DTensor", p) for n, p in self.model.named_parameters()}
        sizes = {name: p.numel() for name, p in self._dtensors.items()}
        self._units = assign_owners(owned, sizes)
        self._owner = {name: owner for owner, names in self._units for name in names}
        for name, p in self._dtensors.items():
            if name not in self._owner:
                _set_parameter(self.mirror, name, cast("nn.Parameter", p))
        self._mirror_params = dict(self.mirror.named_parameters())
        self.optimizer = build_optimizer(self.mirror, config)
        # Rank 0's full model and optimizer on the CPU, for records; `gather_full_` updates them.
        self.full_copy = build(config, device) if distributed.is_rank_zero() else None

    def _fully_shard(self, columns: set[str]) -> None:
        """Shard the model, the weights named in `columns` by columns."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        from torch.distributed.tensor import Shard

        with unset_fake_temporarily():  # the mesh reads its ranks from real tensors
            mesh = init_device_mesh(self._device.type, (distributed.world_size(),))
        by_columns = {id(p) for name, p in self.model.named_parameters() if name in columns}
        for module in [*self.model.model.layers, self.model]:
            fully_shard(
                module, mesh=mesh,
                shard_placement_fn=lambda p: Shard(1) if id(p) in by_columns else None,
            )  # fmt: skip
        for name in ("loss", "token_losses"):
            register_fsdp_forward_method(self.model, name)

    def count(self, params: Sequence[Tensor] | None) -> int:
        """The number of the mirror's parameters (None: of all) that have moments on any rank."""
        chosen = None if params is None else {id(p) for p in params}
        counts = [0, 0]  # sharded on all ranks, and on an owner
        for name, p in self._mirror_params.items():
            if chosen is None or id(p) in chosen:
                state = self.optimizer.state.get(p, {})
                counts[name in self._owner] += any(v is not None for v in state.values())
        owned = torch.tensor(counts[1], device=self._device)
        return counts[0] + int(distributed.all_reduce_sum_(owned))

    @contextmanager
    def _full(self, *names: str) -> Iterator[None]:
        """Full weights in the mirror, on every rank within the block, of those with an owner."""
        owned = [name for name in names if name in self._owner]
        for name in owned:
            self._mirror_params[name].data = self._dtensors[name].full_tensor()
        yield
        for name in owned:
            p, mirrored = self._dtensors[name], self._mirror_params[name]
            overwrite_(p, mirrored.data)
            mirrored.data = placeholder(p)

    @torch.no_grad()
    def gather_full_(self, gradients: bool = False) -> None:
        """Update rank 0's full copy: weights and states, and gradients if asked.

        A collective: all ranks have to call it.
        """
        full = dict(self.full_copy[0].named_parameters()) if self.full_copy else {}
        states: dict[str, dict[str, Any]] = {}
        owned: dict[str, Any] = {}
        for name, mirrored in self._mirror_params.items():
            state = dict(self.optimizer.state.get(mirrored, {}))
            (owned if name in self._owner and state else states)[name] = state
        for (name, kind, key), t in gathered(self._tensors(states, gradients)):
            if kind == "weight":
                full[name].copy_(t)
                full[name].grad = None
            elif kind == "gradient":
                full[name].grad = t
            else:
                states[name][key] = t
        if self._owner:
            owned = {n: {k: _on_cpu(v) for k, v in state.items()} for n, state in owned.items()}
            of_ranks: list[dict[str, Any]] = [{}] * distributed.world_size()
            dist.gather_object(owned, of_ranks if self.full_copy else None)
            states |= {name: state for found in of_ranks for name, state in found.items()}
        if self.full_copy:
            for name, p in full.items():  # a frozen weight has no state, not an empty one
                self.full_copy[1].state.pop(p, None)
                if states.get(name):
                    self.full_copy[1].state[p] = states[name]
            _copy_groups_(self.optimizer, self.full_copy[1])

    def _tensors(
        self, states: dict[str, dict[str, Any]], gradients: bool
    ) -> dict[tuple[str, str, str], Tensor]:
        """What rank 0 needs in full: by the name of a weight, a kind, and the key of a state."""
        found: dict[tuple[str, str, str], Tensor] = {}
        for name, p in self._dtensors.items():
            found[name, "weight", ""] = p
            if gradients and p.grad is not None:
                found[name, "gradient", ""] = p.grad
            for key, value in states.get(name, {}).items():
                if isinstance(value, Tensor):
                    found[name, "state", key] = value
        return found

    @torch.no_grad()
    def load_full_(self, model: Llama, optimizer: torch.optim.Optimizer) -> None:
        """Load this rank's shards of a full model and of its optimizer's states."""
        for name, weight in model.named_parameters():
            p, mirrored = self._dtensors[name], self._mirror_params[name]
            overwrite_(p, weight.detach())
            state = optimizer.state.get(weight, {})
            if not state or self._owner.get(name) not in (None, distributed.rank()):
                continue
            for key, value in state.items():
                own = value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                entries = isinstance(value, Tensor) and value.shape == p.shape
                if entries and name not in self._owner:
                    own = shard_as(own, p)
                self.optimizer.state[mirrored][key] = own
        if isinstance(self.optimizer, ProjectedAdamW):
            self.optimizer.place_states_()
        _copy_groups_(optimizer, self.optimizer)

    def new_full(self) -> tuple[Llama, torch.optim.Optimizer]:
        """A full model and optimizer on the CPU, to load a checkpoint into."""
        if self.full_copy:
            return self.full_copy
        model = build_to_load(self._config)
        return model, build_optimizer(model, self._config)

    def persistent(self) -> Breakdown:
        """Bytes of weights, gradients and states that this rank stores between steps."""
        found = persistent(self.mirror, self.optimizer)
        shards = [(local_part(p), p.requires_grad) for p in self._dtensors.values()]
        found.frozen = tensor_bytes(shard for shard, trains in shards if not trains)
        found.gradients = tensor_bytes(shard for shard, trains in shards if trains)
        found.weights = found.frozen + found.gradients + tensor_bytes(self.model.buffers())
        return found


def _mirror_of(model: Llama) -> Llama:
    """A copy of the model with placeholders as parameters; buffers are shared."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    mirror = copy.deepcopy(model, shared)
    for name, weight in model.named_parameters():
        stand_in = nn.Parameter(placeholder(weight), requires_grad=weight.requires_grad)
        _set_parameter(mirror, name, stand_in)
    return mirror


def _set_parameter(model: nn.Module, name: str, p: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, p)


def placeholder(p: Tensor) -> Tensor:
    """A tensor shaped like a weight that is stored elsewhere; it takes the memory of one entry."""
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _copy_groups_(source: torch.optim.Optimizer, to: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(source.param_groups, to.param_groups, strict=True):
        theirs.update({k: v for k, v in ours.items() if k != "params"})
