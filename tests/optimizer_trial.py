"""What a row of optimizer_rows.py says, and a small problem on which its optimizer is tried."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from small_matrices import (
    LR,
    SQUARE,
    STEPS,
    TALL,
    WIDE,
    assert_equal_states,
    factors_of,
    gradients,
    start,
)
from torch import nn

SIZES = tuple((shape, r) for shape in (SQUARE, TALL, WIDE) for r in (1, 4, min(shape)))


def never_wrong(shape, rank, keys):
    return True


@dataclass(frozen=True)
class Row:
    """One optimizer, or one of its variants."""

    name: str
    cls: Callable
    keys: dict  # of the group of the matrix
    soon: dict  # keys with which everything rare happens within five steps
    # What is in that group: a matrix with a rank (`ranked`), or one that its keys mark (`marked`);
    # two `factors`; a matrix and all else (`whole`)
    kind: str = "ranked"
    gradients: Callable = gradients
    steps: int = STEPS
    equations: Callable | None = None
    sizes: tuple = SIZES  # pairs of a shape and a rank
    cases: tuple = ({},)  # further keys with which the equations and the package are followed
    tolerance: float = 1e-5
    package: Callable | None = None
    package_is_right: Callable = never_wrong
    theirs: Callable = dict  # our keys in the package's names
    bf16: float = 1.2  # the error in bfloat16 is at most this many times the package's
    half: tuple = ({},)  # further keys with which that is so
    converges: dict = field(default_factory=dict)  # `steps`, `lr`, `share`, and keys
    refused: tuple = ()  # pairs of keys and the start of the message
    unknown: tuple = ()  # keys that its groups don't have
    size: float = 1.0  # of the entries of the factors before the first step
    stops: tuple = (7, 9, 10)  # steps at which it is saved: a refresh is at hand, due or done

    def __repr__(self):
        return self.name

    def with_(self, name, keys=(), soon=(), **changes):
        """A variant: followed by its equations and package once, in the row it comes from."""
        kept = {"equations": None, "package": None, "refused": (), "unknown": ()} | changes
        return replace(self, name=f"{self.name} {name}", keys=self.keys | dict(keys),
                       soon=self.soon | dict(soon), **kept)  # fmt: skip


class Trial:
    """A matrix (or two factors), a vector beside it, and an optimizer of both."""

    def __init__(self, row, shape=TALL, rank=4, dtype=torch.float32, cls=None, **keys):
        options = {k: keys.pop(k) for k in ("lr", "weight_decay") if k in keys}
        self.row, options = row, {"lr": LR} | options
        keys = row.keys | keys
        matrices = start(shape, dtype)[:1]
        if row.kind == "factors":
            matrices = [row.size * X for X in factors_of(shape, rank, dtype)]
        self.matrices = [nn.Parameter(x) for x in matrices]
        self.b = nn.Parameter(start(shape, dtype)[1])
        if cls is None and "refresh" in getattr(row.cls, "group_defaults", {}):
            keys = {"refresh": "svd"} | keys  # `auto` is another one on CUDA's path
        cls = cls or row.cls
        if row.kind == "whole":
            self.optimizer = cls([*self.matrices, self.b], **options, **keys)
        else:
            marked = {"rank": rank} if row.kind != "marked" else {}
            groups = [{"params": [self.b]}, {"params": self.matrices, **marked, **keys}]
            self.optimizer = cls(groups, **options)

    @property
    def params(self):
        return [*self.matrices, self.b]

    @property
    def states(self):
        return [self.optimizer.state[p] for p in self.params]

    def result(self):
        """The matrix, or the product of the factors, in float64."""
        first, *rest = (p.detach().double() for p in self.matrices)
        return first @ rest[0] if rest else first.clone()

    def give(self, G):
        """Gradients of the parameters from that of the matrix."""
        if self.row.kind == "factors":
            B, A = (p.detach() for p in self.matrices)
            self.matrices[0].grad, self.matrices[1].grad = G @ A.T, B.T @ G
        else:
            self.matrices[0].grad = G.clone()
        self.b.grad = G.sum(1) if G.ndim == 2 else G.sum().expand(self.b.shape).clone()

    def advance(self, grads, seen=None):
        """Take a step with each gradient; append the projections and masks after it to `seen`."""
        for G in grads:
            self.give(G)
            self.optimizer.step()
            if seen is not None:
                state = self.optimizer.state[self.matrices[0]]
                seen.append({k: v.clone() for k, v in state.items()
                             if k == "mask" or k.startswith("projection_")})  # fmt: skip
        return self

    def copy_from(self, other):
        for p, q in zip(self.params, other.params, strict=True):
            p.data.copy_(q.data)


def shapes_of(states):
    """The shapes of all tensors in some states."""
    return [{k: v.shape for k, v in state.items() if isinstance(v, torch.Tensor)}
            for state in states]  # fmt: skip


def refuse(trial, state_dict, message):
    """The load is refused in one line, and the optimizer is as it was."""
    groups, states = copy.deepcopy(trial.optimizer.param_groups), copy.deepcopy(trial.states)
    with pytest.raises(ValueError, match=message) as refusal:
        trial.optimizer.load_state_dict(state_dict)
    assert "\n" not in str(refusal.value)
    for one, other in zip(trial.states, states, strict=True):
        assert_equal_states(one, other)
    for one, other in zip(trial.optimizer.param_groups, groups, strict=True):
        assert {**one, "params": 0} == {**other, "params": 0}
