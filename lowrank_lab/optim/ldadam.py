"""LDAdam (2410.16103): Adam in a subspace that follows the gradient in every step.

Shapes in this file: G and W are m×n; P is m×r or n×r; m, v, R and N are r×n or m×r.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.optim.adam import to_state_precision
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import is_number, require, require_bool
from lowrank_lab.optim.projecting import project_back_add_, projected_gradient
from lowrank_lab.optim.projection import (
    ONE_SIDED,
    PROJECTIONS,
    gather_projections,
    get_projections,
    load_projections,
    require_finite,
)
from lowrank_lab.optim.stacks import Matrices, StackedStates, Stacks
from lowrank_lab.optim.state_bytes import Weight, projected_states
from lowrank_lab.optim.subspace_adamw import SubspaceAdamW
from lowrank_lab.optim.subspaces import sides
from lowrank_lab.optim.turned import (
    Pair,
    Turn,
    add_back_,
    projected,
    sided,
    turned,
    turned_together,
)

MOVED = (PROJECTIONS, ("exp_avg",), ("exp_avg_sq",))  # entries that are replaced in every step
START = {"update_proj_gap": sys.maxsize}  # get_projections then decomposes in the first step only


class LDAdam(SubspaceAdamW):
    """LDAdam's AdamW: one power iteration per step, moments that follow, and error feedback.

    Keys of a ranked group (default):

    * `rank`: r.
    * `rho` (0.908): weight of the momentum, against the gradient, in what the subspace follows.
    * `proj_type` (std): std | reverse_std | left | right. For square matrices `std` is `right`, as
      in GaLore; in the authors' code it is `left`.
    * `error_feedback` (True): add to each gradient what earlier steps lost by projecting gradients
      and moments. It takes a buffer of the size of the matrix. The authors ran rank 8 with it,
      and rank 256 without.
    * `refresh` (auto): how the first projection is computed; auto | svd | subspace | randomized |
      gram, as in GaLore.

    In all groups ε is added *after* the bias correction, and weight decay precedes the update. A
    gradient that isn't finite raises on a CPU; on CUDA, where the host doesn't wait for its
    values, it makes weights NaN, as in AdamW.

    With DTensors, a matrix is updated in shards along the side that isn't projected. Per step, P is
    gathered, b bᵀP is summed and P′ is broadcast, each r columns of the projected side; the error
    buffer is sharded.

    State of an m×n matrix with b bytes per entry, for `std`: 2·r·max(m, n)·b bytes of moments,
    r·min(m, n)·b of the projection, and m·n·b of the error.

    Source: 2410.16103, algorithm 1, and its published code.
    """

    eps_after: ClassVar[bool] = True
    decays_first: ClassVar[bool] = True
    proj_types: ClassVar[tuple[str, ...]] = ONE_SIDED
    group_defaults: ClassVar[dict[str, Any]] = {
        "rho": 0.908, "proj_type": "std", "error_feedback": True, "refresh": "auto",
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        rho = group["rho"]
        require("rho", rho, is_number(rho) and 0 <= rho < 1, "in [0, 1)")
        require_bool("error_feedback", group["error_feedback"])

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        fed = "rank" in group and group["error_feedback"]
        return super().state_shapes(group, shape) | ({"error": shape} if fed else {})

    def prepare_sharded_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        super().prepare_sharded_(params, group | START)

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        turn = None
        if "exp_avg" not in state:  # P = leading singular vectors of G
            left, right = get_projections(self, state, G, group | START)
        else:
            G = self._with_error(G, state)
            how = self._turn_ if isinstance(G, Tensor) else self._turn_many_
            left, right, turn = how(G, state, group)
        # R = PᵀG;  N = Adam(R);  W ← W − lr · P N
        if isinstance(G, Tensor):
            R: Any = to_state_precision(projected(G, left, right), group)
        else:
            R = projected_gradient(G, left, right, group)
        if group["error_feedback"]:
            self._store_error_(G, R, (left, right), turn, state, group["betas"][0])
        N = self.adam_direction(R, state, group)
        project_back_add_(W, N, left, right, alpha=-step_size)

    def _with_error(self, G: Any, state: Any) -> Any:
        """G plus the error, in a buffer; G itself if there is none."""
        if "error" not in state:
            return G
        if isinstance(G, Tensor):
            return torch.add(G, state["error"], out=self.buffer("fed", G.shape, G))
        torch._foreach_add_(G.items, [s["error"] for s in state.states])
        return Stacks(G.shapes, G.flat)  # their tensors are in the buffer now

    def _turn_(self, G: Tensor, state: Any, group: dict[str, Any]) -> tuple[Any, Any, Turn]:
        """This step's projections (L, R), stored with moments that follow."""
        shape = self.placement.global_shape(G)
        L, R = gather_projections(load_projections(state), shape, self.placement)
        P = R if L is None else L
        assert P is not None
        m, v, weights = state["exp_avg"], state["exp_avg_sq"], _weights(state, group)
        turn = turned(G, P, m, v, L is not None, group["rho"], weights, self.placement)
        if not prefers_few_kernels(G):
            require_finite((turn.new_P, None))
        state[PROJECTIONS[L is None]] = self.placement.local_shard(turn.new_P)
        state["exp_avg"], state["exp_avg_sq"] = turn.new_m, turn.new_v
        return *sided(turn.new_P, L is not None), turn

    def _turn_many_(
        self, G: Stacks, state: StackedStates, group: dict[str, Any]
    ) -> tuple[Any, Any, Turn]:
        """As `_turn_` of each; the projections are stacks, one per run."""
        states = state.states
        P, m, v = (
            _in_runs([next(s[n] for n in names if n in s) for s in states], G) for names in MOVED
        )
        lefts = [sides(group["proj_type"], shape)[0] for _, shape in G.shapes]
        weights = _weights(states[0], group)
        turn = turned_together(G, P, m, v, lefts, group["rho"], weights)
        for new, names in zip((turn.new_P, turn.new_m, turn.new_v), MOVED, strict=True):
            for s, t in zip(states, copies(new.items), strict=True):
                s[next(n for n in names if n in s)] = t
        pairs = [sided(P, left) for P, left in zip(turn.new_P.blocks, lefts, strict=True)]
        return [L for L, _ in pairs], [R for _, R in pairs], turn

    def _store_error_(
        self, G: Any, R: Any, new: tuple[Any, Any], turn: Turn | None, state: Any, beta1: float
    ) -> None:
        """e ← (G − P′R) + β₁/(1−β₁) · (P m − P′m′), both moments without this step's gradient."""
        single, factor = isinstance(G, Tensor), beta1 / (1 - beta1)
        E = G.clone() if single and turn is None else G  # otherwise a buffer
        lefts, rights = ([side] if single else side for side in new)
        pairs: list[list[Pair]] = [[] for _ in lefts]
        if turn is not None:
            R = _plus(R, turn.new_m, factor)
            pairs = [
                [(*found, factor)] for found in zip(_blocks(turn.P), _blocks(turn.m), strict=True)
            ]
        for e, r, old, L, Q in zip(_blocks(E), _blocks(R), pairs, lefts, rights, strict=True):
            add_back_(e, [*old, (Q if L is None else L, r, -1.0)], L is not None)
        if single:
            state["error"] = E if turn is None else E.clone()
            return
        for s, e in zip(state.states, copies(E.items), strict=True):
            s["error"] = e


def _blocks(X: Matrices) -> list[Tensor]:
    return [X] if isinstance(X, Tensor) else X.blocks


def _plus(R: Any, m: Any, factor: float) -> Any:
    """R + factor · m, of matrices or stacks."""
    if isinstance(R, Tensor):
        return torch.add(R, m, alpha=factor)
    return Stacks(R.shapes, torch.add(R.flat, m.flat, alpha=factor))


def _in_runs(tensors: list[Tensor], like: Stacks) -> Stacks:
    """Stacks of tensors in the runs of other ones, also where two runs have equal shapes here."""
    runs, at = [], 0
    for count, _ in like.shapes:
        runs.append((count, tuple(tensors[at].shape)))
        at += count
    return Stacks(runs, None, tensors)


def _weights(state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float]:
    """The weights of m and v before this step: w = (w′ − 1 + β) / β."""
    if not group["correct_bias"]:
        return 1.0, 1.0
    names = ("exp_avg_weight", "exp_avg_sq_weight")
    pairs = zip(names, group["betas"], strict=True)
    first, second = ((state[n] - 1 + beta) / beta if beta else 1.0 for n, beta in pairs)
    return first, second


def ldadam_states(w: Weight, config: ResolvedConfig) -> int:
    """`projected_states`, and the error buffer."""
    return projected_states(w, config) + w.nbytes * (
        w.target and config.method_options["error_feedback"]
    )


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of views into a stack, by one kernel; the views would keep all of it."""
    fresh = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    torch._foreach_copy_(fresh, tensors)
    return fresh
