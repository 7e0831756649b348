"""torch's Muon, with few kernels for many matrices on CUDA's path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.optim.found_inf import add_, decay_, lerp_, off_where
from lowrank_lab.optim.newton_schulz import form_of, orthogonalized
from lowrank_lab.optim.stacks import limited

LAST_NS_STEPS = 99  # torch raises for more


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with the same arguments and states.

    On CUDA's path the momenta of matrices with equal shorter sides are orthogonalized together,
    otherwise one by one, by torch. (Without Nesterov, torch's own step also overwrites bfloat16
    momenta, dividing them by their norms; the joint step does not.)
    """

    found_inf: Tensor | None = None  # a flag on the device, as GradScaler sets it
    # for resets, as torch's Muon: `step` is another one
    state_layout: ClassVar[dict[str, Any]] = {"first": ("momentum_buffer",), "partial": "buffer"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        together = all(prefers_few_kernels(p) and not is_dtensor(p) for p in params)
        if not together or any(g["ns_steps"] > LAST_NS_STEPS for g in self.param_groups):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with off_where(self.found_inf):
            for group in self.param_groups:
                for batch in _batches([p for p in group["params"] if p.grad is not None]):
                    self._update_many_(batch, group)
        return loss

    def _update_many_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        found: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group({**group, "params": params}, found, grads, momenta)
        # M ← μM + (1−μ)G;  U = (1−μ)G + μM (Nesterov) or M;  W ← W − lr·adjusted · U Vᵀ of U
        lerp_(momenta, grads, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(grads, momenta, group["momentum"]))
        lr = float(group["lr"])
        orthogonal = orthogonalized(
            updates, [group["ns_coefficients"]] * group["ns_steps"], group["eps"],
            scale=lambda U: _adjust_lr(lr, group["adjust_lr_fn"], U.shape),
        )  # fmt: skip
        if group["weight_decay"] > 0:
            decay_(params, lr * group["weight_decay"])
        add_(params, orthogonal, alpha=-1.0)


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one dtype and device, those of one form next to each other."""

    def kind(p: Tensor) -> Any:
        return str(p.device), str(p.dtype), str(p.grad.dtype if p.grad is not None else None)

    for _, same in groupby(sorted(params, key=lambda p: (kind(p), *form_of(p))), kind):
        yield from limited(list(same))
