"""Several optimizers as one, for methods that train matrices and other parameters differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Combined(torch.optim.Optimizer):
    """One optimizer that steps several, sharing their groups and states.

    Schedules, momentum resets and checkpoints then work on one optimizer.

    Args:
        optimizers: with disjoint parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the inner optimizers still share the groups and states."""
        super().load_state_dict(state_dict)
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state
