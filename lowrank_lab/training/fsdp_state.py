"""A sharded model, the mirror for its optimizer, and conversion from and to a full model.

torch's `fully_shard` shards the model: weights are gathered block by block while they compute, and
gradients arrive averaged and sharded. The *mirror* is a copy of the model with ordinary tensors as
parameters: this rank's shard of a weight, or a placeholder for a weight that has an owner
(`fsdp_layout`). The optimizer's states belong to the mirror's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.methods.build import build, build_model, build_optimizer
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.training.fsdp_layout import (
    assign_owners,
    column_sharded,
    names_needing_full,
    sharded_placements,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard


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
        self.model = build_model(config)
        if device.type != "cpu":  # fake tensors can't be moved, and are on the CPU
            self.model.to(device)
        self.mirror = _mirror_of(self.model)
        self._mirror_params = dict(self.mirror.named_parameters())
        self.optimizer = build_optimizer(self.mirror, config)
        needed = names_needing_full(self.model, config)
        self._placements = sharded_placements(self._mirror_params, self.optimizer, config)
        self._mesh = self._fully_shard(column_sharded(self.mirror, needed, self._placements))
        self._dtensors = {n: cast("DTensor", p) for n, p in self.model.named_parameters()}
        sizes = {name: p.numel() for name, p in self._dtensors.items()}
        owned = needed - self._placements.keys()
        self._units = assign_owners(owned, sizes, some_sharded=bool(self._placements))
        self._owner = {name: owner for owner, names in self._units for name in names}
        for name, p in self._dtensors.items():
            if name not in self._owner:
                self._mirror_params[name].data = local_shard_of(p)
        if isinstance(self.optimizer, ProjectedAdamW):
            self.optimizer.placements = {
                self._mirror_params[name]: p for name, p in self._placements.items()
            }
        # Rank 0's full model and optimizer on the CPU, for records; `gather_full_` updates them.
        self.full_copy = build(config) if distributed.is_rank_zero() else None

    def _fully_shard(self, columns: set[str]) -> Any:
        """Shard the model, the weights named in `columns` by columns; return the device mesh."""
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
        register_fsdp_forward_method(self.model, "loss")
        return mesh

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
    def _full(self, names: Sequence[str]) -> Iterator[None]:
        """Full weights in the mirror, and their full states, on every rank within the block."""
        with ExitStack() as states:
            for name in names:
                states.enter_context(self._full_states(name))
                self._mirror_params[name].data = self._dtensors[name].full_tensor()
            yield
        for name in names:
            p, mirrored = self._dtensors[name], self._mirror_params[name]
            local_shard_of(p).copy_(shard_view(mirrored.data, shard_dim_of(p)))
            mirrored.data = placeholder(p) if name in self._owner else local_shard_of(p)

    @contextmanager
    def _full_states(self, name: str) -> Iterator[None]:
        """Full states of a weight within the block, on every rank or on its owner."""
        dims = self._sharded_states(name)
        state = self.optimizer.state.get(self._mirror_params[name], {})
        state.update({key: self._gather_state(name, key, dim) for key, dim in dims.items()})
        yield
        for key, dim in dims.items():
            state[key] = shard_view(state[key], dim).clone(memory_format=torch.contiguous_format)

    def each_full(self, params: Iterable[Tensor]) -> Iterator[Tensor]:
        """Parameters of the mirror, one at a time, each with full states while it is yielded."""
        names: dict[Tensor, str] = {p: name for name, p in self._mirror_params.items()}
        for p in params:
            with self._full_states(names[p]):
                yield p

    def _sharded_states(self, name: str) -> dict[str, int]:
        """The dimensions of a weight's sharded states."""
        state = self.optimizer.state.get(self._mirror_params[name], {})
        shape = local_shard_of(self._dtensors[name]).shape
        dims = {key: self._state_shard_dim(name, key, value, shape) for key, value in state.items()}
        return {key: dim for key, dim in dims.items() if dim is not None}

    def _state_shard_dim(self, name: str, key: str, value: Any, shape: torch.Size) -> int | None:
        """The dimension along which a weight's state is sharded, or None.

        Args:
            name: of the weight.
            key: of the state.
            value: of the state, a shard or full.
            shape: of the weight, the shard's or the full one as for the state.
        """
        if name in self._owner or not isinstance(value, Tensor):
            return None
        if name in self._placements:
            dim = 0 if key.startswith("projection") else self._placements[name].dim
            return dim if value.ndim else None  # norms of the full matrix are numbers
        return shard_dim_of(self._dtensors[name]) if value.shape == shape else None

    def _gather_state(self, name: str, key: str, dim: int) -> Tensor:
        """A full state from its shards along a dimension."""
        from torch.distributed.tensor import DTensor, Shard

        shard: Tensor = self.optimizer.state[self._mirror_params[name]][key]
        even = shard.shape[dim] * distributed.world_size()
        length = even if name in self._placements else self._dtensors[name].shape[dim]
        shape = torch.Size(length if i == dim else n for i, n in enumerate(shard.shape))
        joint = DTensor.from_local(
            shard, self._mesh, [Shard(dim)], run_check=False,
            shape=shape, stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip
        return joint.full_tensor()

    @torch.no_grad()
    def gather_full_(self, gradients: bool = False) -> None:
        """Update rank 0's full copy: weights and states, and gradients if asked.

        A collective: all ranks have to call it.
        """
        full = dict(self.full_copy[0].named_parameters()) if self.full_copy else {}
        owned: dict[str, Any] = {}
        for name, p in self._dtensors.items():
            state = dict(self.optimizer.state.get(self._mirror_params[name], {}))
            weight = p.full_tensor()
            grad = full_gradient(p) if gradients else None
            for key, dim in self._sharded_states(name).items():
                state[key] = self._gather_state(name, key, dim).cpu()
            if name in self._owner and state:
                owned[name] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
            if self.full_copy:
                full[name].copy_(weight)
                full[name].grad = None if grad is None else grad.cpu()
                self.full_copy[1].state[full[name]] = state
        gathered: list[dict[str, Any]] = [{}] * distributed.world_size()
        dist.gather_object(owned, gathered if self.full_copy else None)
        if self.full_copy:
            for name, state in ((n, s) for states in gathered for n, s in states.items()):
                self.full_copy[1].state[full[name]] = state
            _copy_groups_(self.optimizer, self.full_copy[1])

    @torch.no_grad()
    def load_full_(self, model: Llama, optimizer: torch.optim.Optimizer) -> None:
        """Load this rank's shards of a full model and of its optimizer's states."""
        for name, weight in model.named_parameters():
            p, mirrored = self._dtensors[name], self._mirror_params[name]
            local_shard_of(p).copy_(shard_view(weight, shard_dim_of(p)))
            state = optimizer.state.get(weight, {})
            if not state or self._owner.get(name) not in (None, distributed.rank()):
                continue
            for key, value in state.items():
                dim = self._state_shard_dim(name, key, value, weight.shape)
                local = value if dim is None else shard_view(value, dim).contiguous()
                if isinstance(local, Tensor):
                    local = local.to(p.device, copy=True)
                self.optimizer.state[mirrored][key] = local
        _copy_groups_(optimizer, self.optimizer)

    def new_full(self) -> tuple[Llama, torch.optim.Optimizer]:
        """A full model and optimizer on the CPU, to load a checkpoint into."""
        return self.full_copy or build(self._config)

    def persistent(self) -> Breakdown:
        """Bytes of weights, gradients and states that this rank stores between steps."""
        found = persistent(self.mirror, self.optimizer)
        shards = [(local_shard_of(p), p.requires_grad) for p in self._dtensors.values()]
        found.frozen = tensor_bytes(shard for shard, trains in shards if not trains)
        found.gradients = tensor_bytes(shard for shard, trains in shards if trains)
        found.weights = found.frozen + found.gradients + tensor_bytes(self.model.buffers())
        return found


def _mirror_of(model: Llama) -> Llama:
    """A copy of the model with placeholders as parameters; buffers are shared."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    mirror = copy.deepcopy(model, shared)
    for name, weight in model.named_parameters():
        module, _, last = name.rpartition(".")
        mirrored = nn.Parameter(placeholder(weight), requires_grad=weight.requires_grad)
        setattr(mirror.get_submodule(module), last, mirrored)
    return mirror


def placeholder(p: Tensor) -> Tensor:
    """A tensor shaped like a weight that is stored elsewhere; it takes the memory of one entry."""
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)


def local_shard_of(p: DTensor) -> Tensor:
    """This rank's shard itself, for changes in place; FSDP would not see other changes."""
    return cast("DTensor", p.detach()).to_local()


def shard_dim_of(p: DTensor) -> int:
    """The dimension along which a weight is sharded."""
    return cast("Shard", p.placements[0]).dim


def shard_view(full: Tensor, dim: int) -> Tensor:
    """This rank's shard of a full tensor, as a view; the last shards may be shorter or empty."""
    length = full.shape[dim]
    step = -(-length // distributed.world_size())
    start = min(length, step * distributed.rank())
    return full.narrow(dim, start, min(step, length - start))


def full_gradient(p: DTensor) -> Tensor | None:
    """The full gradient of a sharded weight, gathered on every rank."""
    return None if p.grad is None else cast("DTensor", p.grad).full_tensor()


def _copy_groups_(source: torch.optim.Optimizer, to: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(source.param_groups, to.param_groups, strict=True):
        theirs.update({k: v for k, v in ours.items() if k != "params"})
