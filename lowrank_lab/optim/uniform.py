"""The loop of methods that treat all parameters alike, matrices or not (SPAM, Stable-SPAM)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.checks import require_int


class UniformAdam(ProjectedAdamW):
    """Adam whose `update_` is called for every parameter; groups have no `rank`.

    Every default is also a key of a group. `update_` applies weight decay itself.
    """

    has_ranked_groups: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        torch.optim.Optimizer.__init__(self, params, {**defaults, "correct_bias": True})

    def check_any_group(self, group: dict[str, Any]) -> None:
        super().check_any_group(group)
        self.check_group(group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse values of a group that are out of range."""
        require_int("update_proj_gap", group["update_proj_gap"], 1)

    def dim_of(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return self.shard_dim(group, shape)

    def can_stack(self, group: dict[str, Any]) -> bool:
        return True

    def work(self) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        """Groups with equal values are one: all their parameters are updated together."""
        joint: list[tuple[list[Tensor], dict[str, Any]]] = []
        for params, group in super().work():
            same = (known for known in joint if _have_equal_values(known[1], group))
            if (found := next(same, None)) is not None:
                found[0].extend(params)
            else:
                joint.append((params, group))
        yield from joint

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._update_each_([p for p in params if p.numel() > 0], group)


def _have_equal_values(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two groups differ in nothing but their parameters."""
    names = (one.keys() | other.keys()) - {"params", "param_names"}
    pairs = [(one.get(name), other.get(name)) for name in names]
    return all(a is b or (not isinstance(a, Tensor) and bool(a == b)) for a, b in pairs)
