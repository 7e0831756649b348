"""NorMuon (2510.05491): orthogonalized momentum, its rows scaled to equal root mean squares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _adjust_lr

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.channels import channels_along
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import is_number, require, require_bool, require_choice, require_int
from lowrank_lab.optim.found_inf import lerp_, zero_if_off_
from lowrank_lab.optim.momentum import NS_PRECISIONS, MomentumOptimizer, averaged, ns_dtype
from lowrank_lab.optim.newton_schulz import orthogonalized
from lowrank_lab.optim.stacks import (
    Matrices,
    StackedStates,
    Stacks,
    State,
    stack_shapes,
    tensors_of,
)
from lowrank_lab.optim.state_bytes import Weight, two_moments

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)  # of torch's Muon
UPDATE_SCALES = ("preserve_norm", "match_rms")
RMS = 0.2  # of an update with `match_rms`


class NorMuon(MomentumOptimizer):
    """NorMuon on the groups with `use_muon`, and AdamW on all others.

        M ← βM + (1−β)G;  U ← (1−β)G + βM (Nesterov) or M;  Q ← Newton–Schulz(U)
        v ← β₂v + (1−β₂) mean(Q², 1);  N ← Q / (√v + ε)
        W ← W − lr · a · ‖Q‖ · N / (‖N‖ + ε)

    Keys of a group of matrices (default), those of `pytorch_optimizer.NorMuon`, whose updates it
    equals:

    * `use_muon`: True; a group with False, or without the key, is AdamW.
    * `momentum` (0.95), `nesterov` (True), `beta2` (0.95): β and β₂.
    * `update_scale` (preserve_norm): as above. `match_rms`, the paper's: the update has the root
      mean square 0.2, as typical updates of AdamW, whose learning rates then suit.
    * `use_adjusted_lr` (False): with preserve_norm, a = 0.2·√max(m, n) instead of √max(1, m/n).
    * `ns_steps` (5): iterations of Newton and Schulz's method (`newton_schulz`).
    * `ns_precision` (bf16): its precision; `fp32` is an addition of this class.

    AdamW adds ε after the bias correction. Weight decay is decoupled and applied before the update.

    State of an m×n matrix: M and v, mn + m entries. DTensors are updated in shards along dimension
    0: each rank gathers U (mn entries, in the precision of the iteration), and orthogonalizes it;
    norms add one number per matrix. Matrices sharded along dimension 1 are redistributed.

    Args:
        params: groups; those without `use_muon` are plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of AdamW's moments.
        eps: of AdamW, and ε above; the package's is 1e-10.
        weight_decay: decoupled, applied before the update with lr · weight_decay.
        adam_scale: learning rate of AdamW's groups as a multiple of lr; also a key of a group.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key, or a tensor that is no matrix in
            a group with `use_muon`.
    """

    marker: ClassVar[str] = "use_muon"
    eps_after: ClassVar[bool] = True
    loads_from: ClassVar[tuple[str, ...]] = ("torch",)
    group_defaults: ClassVar[dict[str, Any]] = {
        "momentum": 0.95, "beta2": 0.95, "nesterov": True, "ns_steps": 5, "ns_precision": "bf16",
        "update_scale": "preserve_norm", "use_adjusted_lr": False,
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        adam_scale: float = 1.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, adam_scale)

    def acts_on(self, group: dict[str, Any]) -> bool:
        return group.get("use_muon") is True

    def check_group(self, group: dict[str, Any]) -> None:
        for key in ("use_muon", "nesterov", "use_adjusted_lr"):
            require_bool(key, group[key])
        require_choice("update_scale", group["update_scale"], UPDATE_SCALES)
        require_choice("ns_precision", group["ns_precision"], NS_PRECISIONS)
        require_int("ns_steps", group["ns_steps"], 1)
        beta2 = group["beta2"]
        require("beta2", beta2, is_number(beta2) and 0 <= beta2 < 1, "in [0, 1)")
        if self.acts_on(group):
            super().check_group(group)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        if not self.acts_on(group):
            return super().state_shapes(group, shape)
        return {**super().state_shapes(group, shape), "exp_avg_sq": (shape[0], 1)}

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return 0

    def stack_order(self, p: Tensor, *, marked: bool) -> Any:
        # Neighbours have rows of equal length, or equally many.
        return (p.shape[-1], -p.shape[0]) if marked else super().stack_order(p, marked=marked)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        averages = averaged(state, G, group["momentum"])
        updates = averages
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(tensors_of(G), averages, group["momentum"]))
        Q: Any = self._orthogonalized(updates, G, group)
        if isinstance(Q, Stacks):
            W.G = Q
        channels: Any = channels_along(Q, 1, self.placement)
        # v ← β₂v + (1−β₂) mean(Q², 1);  N ← Q / (√v + ε);  W ← W − lr · a · ‖Q‖ · N / (‖N‖ + ε)
        rms = _rms(Q, channels)
        v = row_averages(state, Q, rms, group["beta2"])
        kept = group["update_scale"] == "preserve_norm"
        runs = [(1, self.placement.global_shape(Q))] if isinstance(Q, Tensor) else Q.shapes
        factors = [_factor(shape, group) for _, shape in runs]
        ratios = [(n, factor / factors[0]) for (n, _), factor in zip(runs, factors, strict=True)]
        scale = _scale_rows_(Q, rms, v, channels, group["eps"], kept, tuple(ratios))
        if isinstance(Q, Tensor):
            zero_if_off_(scale)
        channels.add_scaled_(W, Q, scale, alpha=-float(group["lr"]) * factors[0])

    def _orthogonalized(
        self, updates: list[Tensor], G: Matrices, group: dict[str, Any]
    ) -> Tensor | Stacks:
        """Q in the dtype of G; of a shard, the same rows."""
        dtype = ns_dtype(G.dtype, group)
        schedule = [COEFFICIENTS] * group["ns_steps"]
        if not isinstance(G, Tensor):
            return Stacks.of(orthogonalized(updates, schedule, EPS, dtype))
        rows = self.placement.global_shape(G)[0]
        U = self.placement.all_gather(updates[0].to(dtype), length=rows)
        (Q,) = orthogonalized([U], schedule, EPS, dtype)
        return self.placement.local_shard(Q).to(G.dtype)


@Chain
def _rms(Q: Matrices, channels: Any) -> Tensor:
    """Root mean square of each row."""
    rms: Tensor = channels.rms(Q)
    return rms


@Chain
def _scale_rows_(
    Q: Matrices, rms: Tensor, v: Tensor, channels: Any, eps: float, keeps_norm: bool,
    ratios: tuple[tuple[int, float], ...],
) -> Tensor:  # fmt: skip
    """‖Q‖ / (‖N‖ + ε) / (√v + ε) of each row, without ‖Q‖ if not `keeps_norm`; stacks are scaled.

    `ratios` are numbers of consecutive tensors, and a factor of theirs.
    """
    root = v.sqrt().add_(eps)
    size = channels.total(rms / root).add_(eps)  # both norms have the same factor √n
    length = channels.total(rms).div_(size) if keeps_norm else size.reciprocal_()
    if len(ratios) > 1:
        parts = torch.split(length, [count for count, _ in ratios])
        for part, (_, ratio) in zip(parts, ratios, strict=True):
            if ratio != 1:
                part.mul_(ratio)
    scale: Tensor = channels.over(length, root, Q.dtype)
    channels.scale_(Q, scale)
    return scale


def _factor(shape: tuple[int, ...], group: dict[str, Any]) -> float:
    """What an m×n update is multiplied by; with match_rms, ‖N‖ lacks the factor √n."""
    if group["update_scale"] == "match_rms":
        return RMS * math.sqrt(shape[0])
    how = "match_rms_adamw" if group["use_adjusted_lr"] else "original"
    return float(_adjust_lr(1.0, how, torch.Size(shape)))


def row_averages(state: State | StackedStates, Q: Matrices, rms: Tensor, beta2: float) -> Tensor:
    """v ← β₂v + (1−β₂)·rms², in place; v of all rows, shaped like `rms`."""
    states = [state] if isinstance(state, dict) else state.states
    for each, X in zip(states, tensors_of(Q), strict=True):
        if "exp_avg_sq" not in each:
            each["exp_avg_sq"] = X.new_zeros((len(X), 1))
    vs: list[Tensor] = [each["exp_avg_sq"] for each in states]
    new = torch.mul(rms, rms, out=torch.empty_like(rms, dtype=vs[0].dtype))
    if isinstance(Q, Tensor):
        lerp_(vs, [new], 1 - beta2)
        return vs[0]
    lerp_(vs, Stacks(stack_shapes(vs), new).items, 1 - beta2)
    return Stacks.of(vs).flat


def normuon_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of M and v of the target matrices; m and v of AdamW for the rest."""
    return w.nbytes + w.shape[0] * w.itemsize if w.target else two_moments(w, config)
