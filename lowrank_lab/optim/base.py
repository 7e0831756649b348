"""One loop for all optimizers of this project: states, the Adam core, and what each method adds.

A method is a subclass with one function, `update_`, called for each parameter of the groups that
have a `rank`; all other groups are plain AdamW. Conventions are those of galore-torch: ε is added
to √v *before* the bias correction, weight decay is decoupled and applied *after* the update.

Adam keeps the weights of its two averages, w₁ ← β₁w₁ + 1 − β₁ and w₂ likewise, in place of a step
count: from zero they are the usual 1 − βᵗ, and a momentum reset of any strength can scale them
together with the averages, so that bias correction stays exact (`techniques.reset_momentum_`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowrank_lab.distributed import REPLICATED, Placement

# Keys of a group that torch and its schedulers add.
FOREIGN_KEYS = ("params", "param_names", "initial_lr")
# A step count at which Adam's 1 − βᵗ is 1 for every β: the fused kernel then corrects no bias.
_LONG_AGO = 1e12
_SEED_STRIDE = 1_000_003  # keeps the random roundings of two parameters apart
PRECISIONS = ("same", "fp32")  # of Adam's averages


def adam_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p − step_size · m / (√v + ε), fused, in place.

    Bias correction is in `step_size`. All tensors of one call share a dtype and a device: the
    kernel is called without torch's sorting by both, some 50 µs a call on a CPU.
    """
    long_ago = torch.full((), _LONG_AGO, dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], [long_ago] * len(params),
        lr=step_size, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def adam_direction(
    g: Tensor,
    state: dict[str, Any],
    betas: tuple[float, float],
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Update the averages with g; return N = m / (√v + ε), shaped like g, bias uncorrected."""
    N = torch.zeros_like(g) if out is None else out.zero_()
    m, v = averages(state, g)
    adam_update_([N], [g], [m], [v], step_size=-1.0, betas=betas, eps=eps)
    return N


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` are updated by the subclass's `update_`.

    Args:
        params: tensors or groups; a group without `rank` is plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of the two averages.
        eps: added to √v before bias correction.
        weight_decay: decoupled, applied after the update with lr · weight_decay.
        correct_bias: False leaves out Adam's bias correction.
        state_precision: `same` keeps the averages in the dtype of the weights, `fp32` in float32.
        stochastic_rounding: round bfloat16 weights up or down at random, so that on average they
            also follow updates below their precision. Deterministic: drawn from the step.

    Raises:
        ValueError: a hyperparameter out of range, an unknown or missing group key, or a parameter
            of a ranked group that isn't a matrix or has a side shorter than the rank.
    """

    group_defaults: ClassVar[dict[str, Any]] = {}  # keys of a ranked group and their defaults
    # Weights of which this process holds a part, and how it holds the one that is being updated.
    placements: Mapping[Tensor, Placement] = MappingProxyType({})
    placement: Placement = REPLICATED

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
        del no_deprecation_warning  # accepted, since callers of galore-torch and fira pass it
        _check("lr", lr, lr >= 0, "at least 0")
        _check("betas", betas, all(0 <= b < 1 for b in betas), "each in [0, 1)")
        _check("eps", eps, eps >= 0, "at least 0")
        _check("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "correct_bias": correct_bias, "state_precision": state_precision,
            "stochastic_rounding": stochastic_rounding,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        precision = (self.defaults | param_group).get("state_precision", "same")
        refuse("state_precision", precision, precision not in PRECISIONS, " or ".join(PRECISIONS))
        if "rank" in param_group:
            known = {*FOREIGN_KEYS, "rank", *self.defaults, *self.group_defaults}
            for key, value in param_group.items():
                _check(key, value, key in known, f"no such key; known: {', '.join(sorted(known))}")
            for key, default in self.group_defaults.items():
                param_group.setdefault(key, default)
            super().add_param_group(param_group)
            try:
                self.check_group(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise
        else:
            super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that every state keeps its own dtype instead of its parameter's."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][key].dtype:
                    self.state[p][key] = value.to(p.device, copy=True)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse a ranked group whose keys or parameters the method can't work with."""
        rank = group["rank"]
        _check("rank", rank, isinstance(rank, int) and rank >= 1, "a whole number from 1")
        for p in group["params"]:
            fits = p.ndim == 2 and rank <= min(p.shape)
            _check(
                "rank", rank, fits, f"at most the smaller side of each matrix, not {tuple(p.shape)}"
            )

    def cut(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        """Along which dimension processes can hold parts of a weight that `update_` is called for.

        `update_` then gets local shards of W, G and the moments, and uses `placement` for the rest.
        None, the default: it needs whole weights.
        """
        return None

    def prepare_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """What is done together for the parts of several matrices before `update_` of each."""

    def update_(
        self, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any], step_size: float
    ) -> None:
        """One step of one matrix: change W (m×n), given its gradient G, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("sparse gradients are not supported; use a dense embedding")
            self.step_group_(params, group)
        self.__dict__.pop("_buffers", None)  # what is used again within a step isn't held between
        return loss

    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        if "rank" in group:
            self.prepare_([p for p in params if p in self.placements], group)
            self._update_each_(params, group)
        else:
            self._plain_adamw_(params, group)
        decayed = [p for p in params if not _rounds_at_random(p, group)]  # those in `_written`
        if group["weight_decay"] > 0 and decayed:
            torch._foreach_mul_(decayed, 1.0 - group["lr"] * group["weight_decay"])

    def _update_each_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            assert p.grad is not None
            state = self._advanced(p, group)
            self.placement = self.placements.get(p, REPLICATED)
            with self._written(p, state, group) as W:
                self.update_(W, p.grad, state, group, _step_size(state, group))
            state["step"] += 1

    def _advanced(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, with the weights of Adam's averages moved on by one step."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state.update(step=0, exp_avg_weight=0.0, exp_avg_sq_weight=0.0)
        beta1, beta2 = group["betas"]
        state["exp_avg_weight"] = beta1 * state["exp_avg_weight"] + 1 - beta1
        state["exp_avg_sq_weight"] = beta2 * state["exp_avg_sq_weight"] + 1 - beta2
        return state

    @contextmanager
    def _written(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Iterator[Tensor]:
        """What an update of p changes: p, or a float32 copy that is rounded into p at random."""
        if not _rounds_at_random(p, group):
            yield p
            return
        W = p.float()
        yield W
        W.mul_(1.0 - group["lr"] * group["weight_decay"])
        seed = (place(self, state) * _SEED_STRIDE + state["step"]) % 2**63
        p.copy_(stochastically_rounded(W, seed))

    def adam_direction(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """`adam_direction` of a projected gradient, into a buffer that is used again."""
        N = self.buffer("direction", R.shape, R)
        return adam_direction(R, state, group["betas"], group["eps"], out=N)

    def buffer(self, name: str, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """An uninitialised tensor like `like`, of that shape: one for all matrices in a step."""
        buffers = self.__dict__.setdefault("_buffers", {})
        key = (name, tuple(shape), like.dtype, like.device)
        if key not in buffers:
            buffers[key] = like.new_empty(shape)
        found: Tensor = buffers[key]
        return found

    def _plain_adamw_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Fused AdamW on all parameters that share a dtype, a device and a step size."""
        if group.get("stochastic_rounding") or group.get("state_precision") == "fp32":
            self._precise_adamw_(params, group)
            return
        batches: dict[Any, list[Tensor]] = {}
        for p in params:
            state = self._advanced(p, group)
            averages(state, p)
            state["step"] += 1
            batches.setdefault((p.dtype, p.device, _step_size(state, group)), []).append(p)
        for (_, _, step_size), batch in batches.items():
            states = [self.state[p] for p in batch]
            adam_update_(
                batch,
                [p.grad for p in batch if p.grad is not None],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                step_size=step_size,
                betas=group["betas"],
                eps=group["eps"],
            )

    def _precise_adamw_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW one by one, for averages of another dtype or weights that are rounded at random."""
        for p in params:
            assert p.grad is not None
            state = self._advanced(p, group)
            g = in_state_precision(p.grad, group)
            N = adam_direction(g, state, group["betas"], group["eps"])
            with self._written(p, state, group) as W:
                W.add_(N, alpha=-_step_size(state, group))
            state["step"] += 1


def _rounds_at_random(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group.get("stochastic_rounding")) and p.dtype == torch.bfloat16


def in_state_precision(g: Tensor, group: dict[str, Any]) -> Tensor:
    """A gradient in the dtype of Adam's averages."""
    wide = group.get("state_precision") == "fp32"
    return g.to(torch.promote_types(g.dtype, torch.float32)) if wide else g


def stochastically_rounded(W: Tensor, seed: int) -> Tensor:
    """W (float32) rounded to bfloat16 up or down, with the chances that keep its expectation."""
    # bfloat16 is the upper half of float32: a random lower half carries into it or not.
    generator = torch.Generator(W.device).manual_seed(seed)
    noise = torch.randint(1 << 16, W.shape, generator=generator, dtype=torch.int32, device=W.device)
    return (W.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def averages(state: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's two averages m and v, created as zeros shaped like `like` if they aren't there."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
    return state["exp_avg"], state["exp_avg_sq"]


def is_quantized(t: Any) -> bool:
    """Whether a state is a tensor made of several, such as torchao's 8-bit ones."""
    return bool(is_traceable_wrapper_subclass(t))


def _step_size(state: dict[str, Any], group: dict[str, Any]) -> float:
    """lr · √w₂ / w₁: the learning rate with both bias corrections in it."""
    lr = float(group["lr"])
    if not group["correct_bias"]:
        return lr
    return lr * math.sqrt(state["exp_avg_sq_weight"]) / float(state["exp_avg_weight"])


def _check(field: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field}: {value!r} is not allowed; {allowed}")


def place(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
    """The number of a state's parameter among all parameters of the optimizer, from 1."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    return next(i for i, p in enumerate(params, 1) if optimizer.state.get(p) is state)


def is_whole(value: object) -> bool:
    """A whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> bool:
    """A real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse(key: str, value: object, bad: bool, allowed: str) -> None:
    """Raise in the words of all refusals if `bad`."""
    if bad:
        raise ValueError(f"{key}: {value!r} is not allowed; {allowed}")
