"""The loop that all optimizers of this package share; a method adds one function, `update_`.

`update_` is called for each parameter of the groups that have a `rank`; all other groups are plain
AdamW. The conventions are galore-torch's: ε is added to √v *before* the bias correction, and weight
decay is decoupled and applied *after* the update. A method with other ones says so
(`eps_after`, `decays_first`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import ANY_DIM, is_dtensor, local_gradient, local_part
from lowrank_lab.optim.adam import (
    adam_moments,
    adam_update_,
    rounds_stochastically,
    state_dtype,
    to_state_precision,
)
from lowrank_lab.optim.chains import compiled_where
from lowrank_lab.optim.checked import CheckedOptimizer
from lowrank_lab.optim.checks import first_non_finite, require, require_adam, require_int
from lowrank_lab.optim.eight_bit import adamw_step_, direction, quantizes
from lowrank_lab.optim.found_inf import decay_, off_where
from lowrank_lab.optim.matrix_updates import MatrixUpdates
from lowrank_lab.optim.saved_state import load_, prepared
from lowrank_lab.optim.stacks import StackedStates, Stacks, gather_, moments_of

JOINED = (
    1 << 20
)  # entries; on CUDA, smaller weights with precise moments are copied and updated together


class ProjectedAdamW(MatrixUpdates, CheckedOptimizer):
    """AdamW whose groups with a `rank` are updated by the subclass's `update_`.

    Args:
        params: tensors or groups; a group without `rank` is plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of the first and second moment.
        eps: added to √v before bias correction.
        weight_decay: decoupled, applied after the update with lr · weight_decay.
        correct_bias: False omits Adam's bias correction.
        state_precision: `same` keeps the moments in the dtype of the weights, `fp32` in float32,
            `8bit` in blocks of 8 bits (`eight_bit`): GaLore, Fira, Apollo and GoLore, with torchao.
        stochastic_rounding: round bfloat16 weights up or down at random, so that updates below
            their precision act in expectation. Deterministic: the seed depends on the step.

    Raises:
        ValueError: a hyperparameter out of range, an unknown or missing group key, or a parameter
            of a ranked group that isn't a matrix or has a side shorter than the rank.
    """

    loads_from: ClassVar[tuple[str, ...]] = ("torch", "adamw")
    found_inf: Tensor | None = None  # a flag on the device, as GradScaler sets it
    compile_chains = False  # see chains.py
    batch: list[Tensor]  # the parameters that are being updated together

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        state_precision: str = "same",
        stochastic_rounding: bool = False,
    ) -> None:
        del no_deprecation_warning  # accepted because callers of galore-torch and fira pass it
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "correct_bias": correct_bias, "state_precision": state_precision,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        require_adam(defaults)
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a ranked group with keys or parameters that the method doesn't support."""
        rank = group["rank"]
        projects = type(self).update_ is not MatrixUpdates.update_
        require("rank", rank, projects, f"{type(self).__name__} has no groups with a rank")
        require_int("rank", rank, 1)
        for p in group["params"]:
            allowed = f"at most the smaller side of each matrix, not {tuple(p.shape)}"
            require("rank", rank, p.ndim == 2 and rank <= min(p.shape), allowed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from this class or from a package that it replaces.

        Values of the saved groups replace the present ones, as in torch; keys that a saved group
        lacks keep their value. `foreign_state` lists the packages whose states are converted.

        Raises:
            ValueError: the state isn't one of this optimizer. Nothing has changed then.
        """
        load_(self, state_dict, partial(prepared, self))
        self.place_states_()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. Parameters without a gradient are skipped.

        `torch.compile` does not compile it: a graph that calls it breaks there.

        Raises:
            RuntimeError: a sparse gradient, or a matrix to decompose that isn't finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.refreshed = {}
        graphs = self.__dict__.setdefault("_graphs", {}) if self.compile_chains else None
        with off_where(self.found_inf), compiled_where(graphs):
            self._step_groups_()
        self.__dict__.pop("_buffers", None)  # buffers are reused within a step, freed after it
        return loss

    def _step_groups_(self) -> None:
        for params, group in self.work():
            if any(p.grad is not None and p.grad.is_sparse for p in params):
                raise RuntimeError("sparse gradients are not supported; use a dense embedding")
            try:
                self.step_group_(params, group)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                which = first_non_finite(self, params)
                if which is None:
                    raise
                message = f"{which} is not finite; {type(self).__name__} can't decompose it"
                raise RuntimeError(message) from error

    def work(self) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        """The parameters of each group that have a gradient, and the group."""
        for group in self.param_groups:
            yield [p for p in group["params"] if p.grad is not None], group

    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        if self.decays_first:
            self._decay_(params, group)
        if self.acts_on(group):
            if sharded := [cast("Tensor", p) for p in params if is_dtensor(p)]:
                self.prepare_sharded_(sharded, group)
            self._update_each_(params, group)
        else:
            self._plain_adamw_(params, group)
        if not self.decays_first:
            self._decay_(params, group)

    def _decay_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        # `_update_target` applies weight decay with stochastic rounding.
        decayed = [p for p in params if not rounds_stochastically(p, group)]
        if group["weight_decay"] > 0 and decayed:
            decay_(list(map(local_part, decayed)), group["lr"] * group["weight_decay"])

    def _plain_adamw_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Fused AdamW on all parameters that share a dtype, a device and a step size."""
        if group.get("stochastic_rounding") or group.get("state_precision", "same") != "same":
            self._precise_adamw_(params, group)
            return
        batches: dict[Any, list[Tensor]] = {}
        for p in params:
            state = self._advanced_state(p, group)
            adam_moments(state, p)
            state["step"] += 1
            rates = (self.step_size_of(state, group), self.eps_of(state, group))
            batches.setdefault((p.dtype, p.device, *rates), []).append(p)
        for (_, _, step_size, eps), batch in batches.items():
            states = [self.state[p] for p in batch]
            adam_update_(
                list(map(local_part, batch)),
                list(map(local_gradient, batch)),
                [local_part(s["exp_avg"]) for s in states],
                [local_part(s["exp_avg_sq"]) for s in states],
                step_size=step_size,
                betas=group["betas"],
                eps=eps,
            )

    def _precise_adamw_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW with moments of another dtype, or with stochastic rounding."""
        together: dict[Any, list[Tensor]] = {}
        for p in params:
            state = self._advanced_state(p, group)
            if self._joins(p, group):
                state["step"] += 1
                rates = (self.step_size_of(state, group), self.eps_of(state, group))
                together.setdefault((p.dtype, p.device, *rates), []).append(p)
                continue
            step_size = self.step_size_of(state, group)
            with (
                self.plain_parts(p, ANY_DIM) as (part, G, parts),
                self._update_target(p, part, state["step"], group) as W,
            ):
                if quantizes(group, W.numel()) and W.is_contiguous():
                    adamw_step_(W, G, parts, group, step_size)
                else:
                    N = direction(
                        to_state_precision(G, group), parts, group, eps=self.eps_of(state, group)
                    )
                    W.add_(N, alpha=-step_size)
            state["step"] += 1
        for (_, _, step_size, eps), batch in together.items():
            self._joint_adamw_(batch, group, step_size, eps)

    def _joins(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether p is small, and a kernel for many such weights rounds it as one of its own."""
        one_by_one = is_dtensor(p) or rounds_stochastically(p, group) or quantizes(group, p.numel())
        assert p.grad is not None
        alike = p.numel() < JOINED and p.grad.dtype == p.dtype
        return prefers_few_kernels(p) and alike and not one_by_one

    def _joint_adamw_(
        self, params: list[Tensor], group: dict[str, Any], step_size: float, eps: float
    ) -> None:
        """W ← W − step_size · N with N in the dtype of the moments, rounded once, of copies."""
        G, W = Stacks.of([cast("Tensor", p.grad) for p in params]), Stacks.of(params)
        gather_(G, W)
        R = Stacks.with_zero_twin(G.shapes, G.flat, state_dtype(G.dtype, group))
        R.flat.copy_(G.flat)
        ms, vs = moments_of(StackedStates([self.state[p] for p in params]), R)
        adam_update_(R.twin.items, R.items, ms, vs, step_size=-1.0, betas=group["betas"], eps=eps)
        new = W.flat.add(R.twin.flat, alpha=-step_size).to(W.dtype)
        torch._foreach_copy_(params, Stacks(W.shapes, new).items)
