"""FSDP2: weights, gradients and optimizer states in shards, a share of them on each process.

torch's `fully_shard` takes care of the model: each block's weights are whole only while it
computes, and gradients arrive averaged and in shards. The optimizer works on a *mirror* of the
model, whose weights are ordinary tensors:

* this process's shard, for updates that treat every entry by itself (AdamW, SPAM): its states are
  shards as well, and nothing travels, or a few numbers for all (Stable-SPAM's norms);
* this process's shard, cut along the side that isn't projected, for projections that need no whole
  gradient (`refresh: gram`, random ones; `ProjectedAdamW.shard_dim`). Moments and projections are
  shards too. What travels a layer: the projection (r columns) in every step, if it isn't drawn from
  a seed, the p×p Gram matrix of the projected side where it is renewed, and a number for a norm of
  the whole. Each process finds the eigenvectors of other layers' Gram matrices;
* nothing, for updates that need whole weights (SVDs, orthogonalisation, pairs of factors, 8-bit
  blocks; matrices that can't be cut evenly). Each layer then has one process that owns it: it alone
  keeps its states, and in every step receives its weights and gradients, updates them as one
  process would, and sends the weights back. Any optimizer can so be used, an SVD is computed once
  and not by all, and never is more than one layer a process whole. What that costs: a layer travels
  three times more a step.

Factors are rows of B and columns of A, so that refactorization exchanges r×r matrices alone, and a
merge A; where columns can't be cut evenly, both are made whole for it.

Checkpoints, spectra and the trained model pass through the memory of the first process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowrank_lab import distributed
from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.distributed import REPLICATED, Placement, Sharded
from lowrank_lab.layers import FactorizedLinear, generator_of, lora_layers
from lowrank_lab.memory.breakdown import Breakdown, persistent, tensor_bytes
from lowrank_lab.methods.build import build, build_model, build_optimizer, partition
from lowrank_lab.methods.optimizers import ADAMS
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.models.llama import Llama
from lowrank_lab.optim import ProjectedAdamW
from lowrank_lab.techniques import Refactorization, refactorize_

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard


def check_shards(config: ResolvedConfig) -> None:
    """Refuse what shards are not sound with."""
    options = config.method_options
    refused = (
        ("per_layer", config.per_layer, "with fsdp2 gradients arrive a block at a time; False"),
        ("compile", config.compile, "it is not tried with fsdp2; False"),
        ("stochastic_rounding", config.stochastic_rounding, "it is not tried with fsdp2; False"),
        ("method_options.warm_start", options.get("warm_start"),
         "with fsdp2 the weights that train are the same from start to end; 0"),
    )  # fmt: skip
    for name, value, allowed in refused:
        if value:
            raise InputError(name, value, allowed)


class Shards:
    """A model in shards, its mirror and the optimizer of the mirror.

    Args:
        device: of this process, which has joined its group.
    """

    def __init__(self, config: ResolvedConfig, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import register_fsdp_forward_method

        self._config, self._device = config, device
        self.model = build_model(config)
        if device.type != "cpu":  # `to` refuses tensors without values
            self.model.to(device)
        shared = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        self.mirror = copy.deepcopy(self.model, shared)
        for name, weight in self.model.named_parameters():
            module, _, last = name.rpartition(".")
            own = nn.Parameter(_absent(weight), requires_grad=weight.requires_grad)
            setattr(self.mirror.get_submodule(module), last, own)
        self._mirrored = dict(self.mirror.named_parameters())
        self.optimizer = build_optimizer(self.mirror, config)
        needed = _needing_whole(self.model, config)
        self._parts = _parts(self._mirrored, self.optimizer, config)
        columns = self._columns(needed)
        with unset_fake_temporarily():  # who has which place in the mesh is read off real tensors
            self._mesh = init_device_mesh(device.type, (distributed.world_size(),))
        for module in [*self.model.model.layers, self.model]:
            self._shard_(module, columns)
        register_fsdp_forward_method(self.model, "loss")
        self._sharded = {n: cast("DTensor", p) for n, p in self.model.named_parameters()}
        self._units = self._assign(needed - self._parts.keys())
        self._owner = {name: owner for owner, names in self._units for name in names}
        for name, p in self._sharded.items():
            if name not in self._owner:
                self._mirrored[name].data = _local(p)
        if isinstance(self.optimizer, ProjectedAdamW):
            self.optimizer.placements = {self._mirrored[n]: part for n, part in self._parts.items()}
        # The first process's whole copy on the CPU, for records; `gather_` brings it up to date.
        self.plain = build(config) if distributed.is_rank_zero() else None

    def _columns(self, needed: set[str]) -> set[str]:
        """Names of the weights that are sharded by columns; all others are by rows."""
        factors = {
            f"{name}.A"
            for name, layer in self.mirror.named_modules()
            if isinstance(layer, FactorizedLinear)
            and not layer.in_features % distributed.world_size()
            and f"{name}.A" not in needed
        }
        return factors | {name for name, part in self._parts.items() if part.dim == 1}

    def _shard_(self, module: nn.Module, columns: set[str]) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        by_columns = {id(p) for name, p in self.model.named_parameters() if name in columns}
        fully_shard(
            module, mesh=self._mesh,
            shard_placement_fn=lambda p: Shard(1) if id(p) in by_columns else None,
        )  # fmt: skip

    def _assign(self, needed: set[str]) -> list[tuple[int, list[str]]]:
        """Units, which are updated together (what trains in a layer), with their owners.

        The largest first, each to the process that has least: states are then spread evenly.
        """
        layers: dict[str, list[str]] = {}
        for name in needed:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        place = {name: i for i, name in enumerate(self._sharded)}
        units = [sorted(names, key=place.__getitem__) for names in layers.values()]
        units.sort(key=lambda names: (-self._entries(names), place[names[0]]))
        processes = distributed.world_size()
        if units and not self._parts and len(units) < processes:
            allowed = f"{len(units)} layers are updated whole: at most as many processes"
            raise InputError("nproc-per-node", processes, allowed)
        held, found = [0] * processes, []
        for names in units:
            owner = held.index(min(held))
            held[owner] += self._entries(names)
            found.append((owner, names))
        return found

    def _entries(self, names: Sequence[str]) -> int:
        return sum(self._sharded[name].numel() for name in names)

    @torch.no_grad()
    def step_(self) -> None:
        """One step of the optimizer from the model's gradients in shards."""
        for name, p in self._mirrored.items():
            grad = self._sharded[name].grad
            if name not in self._owner and grad is not None:
                p.grad = cast("DTensor", grad).to_local()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        own = [
            [names for o, names in self._units if o == r] for r in range(distributed.world_size())
        ]
        for turn in range(max(map(len, own), default=0)):
            self._step_units_({r: units[turn] for r, units in enumerate(own) if turn < len(units)})

    def _step_units_(self, units: dict[int, list[str]]) -> None:
        """One layer of each process: gathered, updated by all at the same time, sent back."""
        me, mine = distributed.rank(), False
        for owner, names in units.items():
            for name in names:
                weight, grad = self._sharded[name].full_tensor(), self._whole_gradient(name)
                if owner == me and grad is not None:
                    self._mirrored[name].data, self._mirrored[name].grad = weight, grad
                    mine = True
        if mine:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for owner, names in units.items():
            for name in names:
                p, own = self._sharded[name], self._mirrored[name]
                if p.grad is None:
                    continue
                whole_now = own.data if owner == me else own.new_empty(p.shape)
                dist.broadcast(whole_now, owner)
                _local(p).copy_(_cut(whole_now, _dim(p)))
                own.data = _absent(p)

    def _whole_gradient(self, name: str) -> Tensor | None:
        grad = cast("DTensor | None", self._sharded[name].grad)
        return None if grad is None else grad.full_tensor()

    @torch.no_grad()
    def refactorize_(self) -> Refactorization:
        """`techniques.refactorize_` of the factors in shards."""
        done = Refactorization([], [], [])
        config = self._config
        how = config.on_refactor, config.refactor_basis, config.refactor_above
        for name, layer in self.mirror.named_modules():
            if isinstance(layer, FactorizedLinear):
                with self._placement(name, whole=("B", "A")) as placement:
                    found = refactorize_(layer, self.optimizer, *how, placement)
                for names, of_layer in zip(done, found, strict=True):
                    names.extend([name] * len(of_layer))
        return done

    @torch.no_grad()
    def merge_(self, seed: int) -> list[str]:
        """`layers.merge_` of the layers in shards."""
        names = []
        for index, (name, layer) in enumerate(lora_layers(self.mirror)):
            with self._placement(name, whole=("A",)) as placement:
                layer.merge_(generator_of(seed, index), placement)
            names.append(name)
        return names

    @contextmanager
    def _placement(self, layer: str, whole: Sequence[str]) -> Iterator[Placement]:
        """How a layer's factors are held: in parts, or else those named are whole within."""
        if _dim(self._sharded[f"{layer}.A"]) == 1:
            yield Sharded(0)
        else:
            with self._whole([f"{layer}.{factor}" for factor in whole]):
                yield REPLICATED

    def count(self, params: Sequence[Tensor] | None) -> int:
        """How many of the mirror's parameters (None: of all) have moments, on any process."""
        chosen = None if params is None else {id(p) for p in params}
        counts = [0, 0]  # in shards on every process, or on one
        for name, p in self._mirrored.items():
            if chosen is None or id(p) in chosen:
                state = self.optimizer.state.get(p, {})
                counts[name in self._owner] += "exp_avg" in state or "momentum_buffer" in state
        return counts[0] + int(
            distributed.all_reduce_sum_(torch.tensor(counts[1], device=self._device))
        )

    @contextmanager
    def _whole(self, names: Sequence[str]) -> Iterator[None]:
        """These weights of the mirror, and their states, whole on every process within."""
        with ExitStack() as states:
            for name in names:
                states.enter_context(self._whole_states(name))
                self._mirrored[name].data = self._sharded[name].full_tensor()
            yield
        for name in names:
            p, own = self._sharded[name], self._mirrored[name]
            _local(p).copy_(_cut(own.data, _dim(p)))
            own.data = _absent(p) if name in self._owner else _local(p)

    @contextmanager
    def _whole_states(self, name: str) -> Iterator[None]:
        """The states of a weight whole within, on every process or on its owner."""
        cuts, state = self._in_shards(name), self.optimizer.state.get(self._mirrored[name], {})
        state.update({key: self._joined(name, key, dim) for key, dim in cuts.items()})
        yield
        for key, dim in cuts.items():
            state[key] = _cut(state[key], dim).clone(memory_format=torch.contiguous_format)

    def each_whole(self, params: Iterable[Tensor]) -> Iterator[Tensor]:
        """Some of the mirror's parameters one by one, each with its states whole in its turn."""
        names: dict[Tensor, str] = {p: name for name, p in self._mirrored.items()}
        for p in params:
            with self._whole_states(names[p]):
                yield p

    def _in_shards(self, name: str) -> dict[str, int]:
        """The states of a weight that are in shards, and along which dimension."""
        state = self.optimizer.state.get(self._mirrored[name], {})
        shape = _local(self._sharded[name]).shape
        cuts = {key: self._cut_of(name, key, value, shape) for key, value in state.items()}
        return {key: dim for key, dim in cuts.items() if dim is not None}

    def _cut_of(self, name: str, key: str, value: Any, shape: torch.Size) -> int | None:
        """Along which dimension a state of a weight of that shape is cut; None: it is not."""
        if name in self._owner or not isinstance(value, Tensor):
            return None
        if name in self._parts:
            dim = 0 if key.startswith("projection") else self._parts[name].dim
            return dim if value.ndim else None  # norms of the whole are numbers
        return _dim(self._sharded[name]) if value.shape == shape else None

    def _joined(self, name: str, key: str, dim: int) -> Tensor:
        """The whole of a weight's state that is in shards along a dimension."""
        from torch.distributed.tensor import DTensor, Shard

        shard: Tensor = self.optimizer.state[self._mirrored[name]][key]
        even = shard.shape[dim] * distributed.world_size()
        length = even if name in self._parts else self._sharded[name].shape[dim]
        shape = torch.Size(length if i == dim else n for i, n in enumerate(shard.shape))
        joint = DTensor.from_local(
            shard, self._mesh, [Shard(dim)], run_check=False,
            shape=shape, stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip
        return joint.full_tensor()

    @torch.no_grad()
    def gather_(self, gradients: bool = False) -> None:
        """Bring the first process's plain copy up to date: weights, states, and gradients if asked.

        All processes have to call it.
        """
        plain = dict(self.plain[0].named_parameters()) if self.plain else {}
        owned: dict[str, Any] = {}
        for name, p in self._sharded.items():
            own = self._mirrored[name]
            state, whole = dict(self.optimizer.state.get(own, {})), p.full_tensor()
            grad = (
                cast("DTensor", p.grad).full_tensor() if gradients and p.grad is not None else None
            )
            for key, dim in self._in_shards(name).items():
                state[key] = self._joined(name, key, dim).cpu()
            if name in self._owner and state:
                owned[name] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
            if self.plain:
                plain[name].copy_(whole)
                plain[name].grad = None if grad is None else grad.cpu()
                self.plain[1].state[plain[name]] = state
        found: list[dict[str, Any]] = [{}] * distributed.world_size()
        dist.gather_object(owned, found if self.plain else None)
        for name, state in ((n, s) for states in found for n, s in states.items()):
            if self.plain:
                self.plain[1].state[plain[name]] = state
        if self.plain:
            _copy_groups_(self.optimizer, self.plain[1])

    @torch.no_grad()
    def take_(self, model: Llama, optimizer: torch.optim.Optimizer) -> None:
        """Take this process's part of a whole model and its optimizer's states."""
        for name, whole in model.named_parameters():
            p, own = self._sharded[name], self._mirrored[name]
            _local(p).copy_(_cut(whole, _dim(p)))
            state = optimizer.state.get(whole, {})
            if not state or self._owner.get(name) not in (None, distributed.rank()):
                continue
            for key, value in state.items():
                dim = self._cut_of(name, key, value, whole.shape)
                part = value if dim is None else _cut(value, dim).contiguous()
                self.optimizer.state[own][key] = _moved(part, p)
        _copy_groups_(optimizer, self.optimizer)

    def blank(self) -> tuple[Llama, torch.optim.Optimizer]:
        """A whole model and optimizer on the CPU, to load a checkpoint into."""
        return self.plain or build(self._config)

    def persistent(self) -> Breakdown:
        """Bytes of the weights, gradients and states that this process holds between steps."""
        found = persistent(self.mirror, self.optimizer)
        shards = [(_local(p), p.requires_grad) for p in self._sharded.values()]
        found.frozen = tensor_bytes(shard for shard, trains in shards if not trains)
        found.gradients = tensor_bytes(shard for shard, trains in shards if trains)
        found.weights = found.frozen + found.gradients + tensor_bytes(self.model.buffers())
        return found


def _absent(p: Tensor) -> Tensor:
    """What stands for a weight that isn't here: its shape, one entry of memory."""
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)


def _local(p: DTensor) -> Tensor:
    """This process's shard itself, for changes in place: other ways FSDP would not see."""
    return cast("DTensor", p.detach()).to_local()


def _dim(p: DTensor) -> int:
    """The dimension along which a weight is sharded."""
    return cast("Shard", p.placements[0]).dim


def _cut(whole: Tensor, dim: int) -> Tensor:
    """This process's shard of a whole tensor, as a view."""
    length = whole.shape[dim]
    step = -(-length // distributed.world_size())
    start = min(length, step * distributed.rank())
    return whole.narrow(dim, start, min(step, length - start))


def _moved(value: Any, p: Tensor) -> Any:
    return value.to(p.device, copy=True) if isinstance(value, Tensor) else value


def _copy_groups_(source: torch.optim.Optimizer, to: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(source.param_groups, to.param_groups, strict=True):
        theirs.update({k: v for k, v in ours.items() if k != "params"})


def _parts(
    weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, config: ResolvedConfig
) -> dict[str, Sharded]:
    """The weights that each process updates its part of, cut evenly on all sides, by name."""
    found: dict[str, Sharded] = {}
    method = METHODS[config.method]
    if not method.shardable or not isinstance(optimizer, ProjectedAdamW):
        return found
    names: dict[Tensor, str] = {p: name for name, p in weights.items()}
    all_in_full = method.full_weights(config.method_options) == "all"
    for group in optimizer.param_groups:
        for p in group["params"] if "rank" in group or all_in_full else ():
            dim = optimizer.shard_dim(group, p.shape)
            if dim is not None and not any(n % distributed.world_size() for n in p.shape):
                found[names[p]] = Sharded(dim)
    return found


def _needing_whole(model: nn.Module, config: ResolvedConfig) -> set[str]:
    """Names of the weights that the run's optimizer can't update entry by entry."""
    method = METHODS[config.method]
    foreign = config.optimizer not in (None, *ADAMS)
    which = "all" if foreign else method.full_weights(config.method_options)
    targets, rest = partition(model, config.target)
    chosen = {id(p) for p in {"none": [], "targets": targets, "all": targets + rest}[which]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}
