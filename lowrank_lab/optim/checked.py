"""Base class of the optimizers here: checks groups, and describes the entries of a state."""

from __future__ import annotations

from typing import Any, ClassVar

from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.optim.adam import PRECISIONS
from lowrank_lab.optim.block_codes import torchao_optim
from lowrank_lab.optim.checks import (
    require,
    require_adam,
    require_bool,
    require_choice,
    require_known_keys,
    require_real,
)
from lowrank_lab.optim.dtensor_optimizer import DTensorOptimizer
from lowrank_lab.optim.eight_bit import EIGHT_BIT

# Entries of a state: shapes of tensors, None for Python numbers
Shapes = dict[str, tuple[int, ...] | None]


class CheckedOptimizer(DTensorOptimizer):
    """An optimizer that refuses groups with unknown keys or values that are not allowed."""

    group_defaults: ClassVar[dict[str, Any]] = {}  # keys of a marked group and their defaults
    has_ranked_groups: ClassVar[bool] = True
    loads_from: ClassVar[tuple[str, ...]] = ()  # sources of `foreign_state.converted`
    in_8_bits: ClassVar[bool] = False  # whether moments may be stored in 8 bits

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        require_known_keys(param_group, self.defaults, self.marked_keys(), self.marker)
        if self.marker in param_group:
            for key, default in self.group_defaults.items():
                param_group.setdefault(key, default)
        super().add_param_group(param_group)
        try:
            self.check_any_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def marked_keys(self) -> tuple[str, ...]:
        """The keys of the groups that the method updates, the marker first."""
        return (self.marker, *self.group_defaults) if self.has_ranked_groups else ()

    def check_any_group(self, group: dict[str, Any]) -> None:
        """Refuse a group, marked or not, with values or parameters that are not supported."""
        require_adam(group)
        require_real(self, group)
        if "state_precision" in group:
            self._check_precision(group)
            require_bool("stochastic_rounding", group["stochastic_rounding"])
        if self.marker in group:
            self.check_group(group)

    def _check_precision(self, group: dict[str, Any]) -> None:
        precision = group["state_precision"]
        known = PRECISIONS if self.in_8_bits else tuple(p for p in PRECISIONS if p != EIGHT_BIT)
        require_choice("state_precision", precision, known)
        if precision == EIGHT_BIT:
            sharded = any(map(is_dtensor, group["params"]))
            allowed = "same or fp32: shards of DTensors would cut its blocks"
            require("state_precision", precision, not sharded, allowed)
            try:
                torchao_optim()
            except ImportError as error:
                require("state_precision", precision, False, str(error))

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group with keys or parameters that the method doesn't support."""

    def upgraded(self, group: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        """The saved entries of a parameter, as this version stores them."""
        return entries

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        """The entries that a parameter of this shape has in its state after a step."""
        numbers = ("step", "exp_avg_weight", "exp_avg_sq_weight")
        return {**dict.fromkeys(numbers), "exp_avg": shape, "exp_avg_sq": shape}
