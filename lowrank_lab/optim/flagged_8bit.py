"""torchao's AdamW with 8-bit moments, whose steps a flag on the device can turn off.

torchao's step changes weights and codes in place and knows no flag. Under one (`found_inf`), it is
taken for one parameter after the other, with a copy of this parameter and its codes, which comes
back where the flag is 1: at any time there is a copy of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.distributed.dtensors import local_part
from lowrank_lab.optim.block_codes import torchao_optim
from lowrank_lab.optim.found_inf import off_where, old_if_off


class FlaggedSteps(torch.optim.Optimizer):
    """Steps of torchao's Adam classes under a flag; to be a base class before one of them."""

    found_inf: Tensor | None = None  # a flag on the device, as GradScaler sets it
    # for resets, as torchao's own: `step` is another one
    state_layout: ClassVar[dict[str, Any]] = {
        "first": ("exp_avg",), "second": ("exp_avg_sq",), "counts": ("step",), "partial": "step",
    }  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; it changes nothing if `found_inf` is 1, new states apart."""
        if self.found_inf is None:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            with off_where(self.found_inf):
                for group in groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            self.param_groups = [{**group, "params": [p]}]
                            self._step_one_(p)
        finally:
            self.param_groups = groups
        return loss

    def _step_one_(self, p: Tensor) -> None:
        state = self.state[p]
        if "step" in state:  # on the host, which takes back what is replaced
            state["step"] = state["step"].clone()
        moments = (value for key, value in state.items() if key != "step")
        changed = [local_part(t) for t in (p, *moments)]
        before = [(part, part.clone()) for t in changed for part in _parts(t)]
        super().step()
        for part, old in before:
            part.copy_(old_if_off(part, old))


def _parts(t: Tensor) -> Iterator[Tensor]:
    """A tensor itself, or the plain tensors of a quantized one that a step changes."""
    if hasattr(t, "codes") and hasattr(t, "scale"):
        yield from (t.codes, t.scale)
    else:
        yield t


@cache
def adamw_8bit_class() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit, of which a flag can turn steps off.

    Raises:
        ImportError: torchao isn't installed; the message says how to.
    """
    theirs = torchao_optim().AdamW8bit
    return type(theirs.__name__, (FlaggedSteps, theirs), {})
