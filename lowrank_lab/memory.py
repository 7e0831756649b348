"""Where the bytes of training are: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods import build, partition, resolve
from lowrank_lab.optim.base import is_quantized
from lowrank_lab.optim.projection import sides


@dataclass
class Breakdown:
    """Bytes by category. `projections` is a part of `optimizer_states`, not beside it."""

    weights: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    projections: int = 0
    activations: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, shared ones counted once."""
    storages = [part.untyped_storage() for t in tensors for part in _parts(t)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _parts(t: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: several, if it is quantized."""
    if not is_quantized(t):
        return [t]
    names: list[str] = t.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return [getattr(t, name) for name in names]


def persistent(model: nn.Module, optimizer: torch.optim.Optimizer) -> Breakdown:
    """Measured bytes of the weights, of the gradients that training holds, and of the states."""
    weights = [*model.parameters(), *model.buffers()]
    states = [
        (k, v) for s in optimizer.state.values() for k, v in s.items() if isinstance(v, Tensor)
    ]
    return Breakdown(
        weights=tensor_bytes(weights),
        gradients=tensor_bytes(p for p in model.parameters() if p.requires_grad),
        optimizer_states=tensor_bytes(t for _, t in states),
        projections=tensor_bytes(t for k, t in states if k.startswith("projection")),
    )


@contextmanager
def measured_activations(model: nn.Module, into: Breakdown) -> Iterator[None]:
    """Count what autograd keeps for the first backward pass in this block: `into.activations`.

    Weights and views of what was counted already are not counted again.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    going_back = False  # from then on activations are freed, and their memory used again

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and not going_back:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    def give_back(t: Tensor) -> Tensor:
        nonlocal going_back
        going_back = True
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield
    into.activations = sum(kept.values())


def optimizer_state_bytes(config: RunConfig) -> int:
    """Bytes of a run's optimizer states by formula: the sum over its weights, nothing allocated.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    config = resolve(config)
    if config.method not in STATE_BYTES or config.optimizer is not None:
        name = "method" if config.optimizer is None else "optimizer"
        raise InputError(name, getattr(config, name), "there is no formula for its states")
    rule = STATE_BYTES[config.method]
    b = 2 if config.precision == "bf16" else 4
    with torch.device("meta"):
        model, _ = build(config.replace(optimizer=None))
    targets, _ = partition(model, config.target)
    of_targets = {id(p) for p in targets}
    return sum(
        rule(p, id(p) in of_targets, b, config) for p in model.parameters() if p.requires_grad
    )


# (weight, whether it is a target, bytes of its elements, resolved configuration) → bytes of states
StateRule = Callable[[Tensor, bool, int, RunConfig], int]
SCALAR = 4  # a step count or a norm, float32


def _adamw(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """torch's AdamW: m, v and a step count."""
    return 2 * p.numel() * b + SCALAR


def _projected(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """m and v of the projected gradient, and the projections; plain Adam for the other weights."""
    of_states = 4 if config.state_precision == "fp32" else b
    if not target:
        return 2 * p.numel() * of_states
    assert config.rank is not None
    m, n = p.shape
    left, right = sides(config.method_options["proj_type"], p.shape)
    rows, columns = (config.rank if left else m), (config.rank if right else n)
    projections = config.rank * (m * left + n * right)
    stored = config.method_options.get("store_projection", True)
    return int(2 * rows * columns * of_states + projections * stored * b)


def _limited(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """A projected method with the norm that its growth limiter compares with."""
    return _projected(p, target, b, config) + SCALAR * target


def _plain(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """m and v; counts are Python numbers."""
    return 2 * p.numel() * b


def _spam(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """m and v of the entries in the mask, and the mask, a byte an entry."""
    density = config.method_options["density"]
    if density == 1 or p.ndim != 2:
        return 2 * p.numel() * b
    return 2 * int(density * p.numel()) * b + p.numel()


def _stable_spam(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """m, v and the running maximum, norm and squared norm."""
    return 2 * p.numel() * b + 3 * SCALAR


def _muon(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """One momentum for the matrices, AdamW for the rest."""
    return p.numel() * b if target else _adamw(p, target, b, config)


def _adamw_8bit(p: Tensor, target: bool, b: int, config: RunConfig) -> int:
    """A byte an entry, a float32 scale a block of 256 and a table of 256, where blocks fit."""
    n = p.numel()
    if n < 4096 or n % 256:
        return 2 * n * b + SCALAR
    return 2 * (n + 4 * (n // 256) + 4 * 256) + SCALAR


STATE_BYTES: dict[str, StateRule] = {
    **dict.fromkeys(("full-rank", "low-rank", "lora", "relora", "sltrain"), _adamw),
    **dict.fromkeys(("galore", "golore"), _projected),
    **dict.fromkeys(("fira", "apollo", "apollo-mini"), _limited),
    "loro": _plain,
    "spam": _spam,
    "stable-spam": _stable_spam,
    "muon": _muon,
    "adamw-8bit": _adamw_8bit,
}
