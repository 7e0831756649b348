"""Spectron (2602.12429): orthogonalized momentum of two factors, steps bounded by their norms.

Shapes in this file: W = B A is m×n, B is m×r, A is r×n; L is the longer side of a factor, and a
factor in wide form is r×L: Bᵀ or A.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import cycle, groupby, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.device import prefers_few_kernels
from lowrank_lab.distributed.dtensors import is_dtensor
from lowrank_lab.distributed.placements import REPLICATED, Placement
from lowrank_lab.optim import stacks
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require_choice, require_int
from lowrank_lab.optim.dtensor_optimizer import param_index
from lowrank_lab.optim.factors import Pair, check_pairs, pairs_of, with_gradients
from lowrank_lab.optim.found_inf import add_, zero_if_off_
from lowrank_lab.optim.matrix_updates import SEED_STRIDE, undone_on_error
from lowrank_lab.optim.momentum import NS_PRECISIONS, MomentumOptimizer, averaged, ns_dtype
from lowrank_lab.optim.newton_schulz import (
    Coefficients,
    orthogonalized,
    orthogonalized_stacks,
)
from lowrank_lab.optim.power_iteration import long_dim, power_step_, power_steps_, vector_shape
from lowrank_lab.optim.stacks import StackedStates, Stacks, State
from lowrank_lab.optim.state_bytes import SCALAR, Weight, two_moments

COEFFICIENTS: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
NS_EPS = 1e-7  # least norm by which a momentum is divided


class Spectron(MomentumOptimizer):
    """Spectron on pairs of factors, and AdamW on everything else.

        M ← βM + (1−β)G;  Q ← Newton–Schulz(M)          for each factor X, B and A
        u ← Y Yᵀ u / ‖Y Yᵀ u‖;  σ ← ‖Yᵀ u‖              power iteration, Y = B and Aᵀ
        X ← X − lr / (σ_B + σ_A + 1) · Q

    So the step of W has at most about the spectral norm lr. The parameters of a group with `rank`
    are factors in the order B1, A1, B2, A2, … (B m×r, A r×n). Other keys of the group (default):

    * `momentum` (0.9): β.
    * `ns_steps` (5): iterations of Newton and Schulz's method (`newton_schulz`), each with the next
      of five sets of coefficients.
    * `ns_precision` (bf16): its precision, bf16 or fp32.

    The authors start from balanced factors of the truncated SVD of a dense initial weight: the
    initialisation `spectral` of low-rank layers. A factor that is zero has σ = 0 and keeps u.

    Equal to the implementation in Emerging-Optimizers with the factors as parameters, and momenta
    in their dtype. AdamW adds ε after the bias correction. Weight decay is decoupled and applied
    before the update. A pair is skipped if one of its factors has no gradient.

    State of a factor: M, and u, L entries in float32 (a random start, seeded by the parameter's
    number). DTensors are updated in shards along the longer side: each rank gathers M (rL entries,
    in the precision of the iteration), and orthogonalizes it; power iteration adds two vectors of r
    entries and one number. Factors sharded along the shorter side are redistributed (all-to-all).

    Args:
        params: groups of pairs with `rank`; groups without it are plain AdamW.
        lr: learning rate, absolute.
        betas: decay rates of AdamW's moments.
        eps: of AdamW, added to √v̂ after bias correction.
        weight_decay: decoupled, applied before the update with lr · weight_decay. The authors' code
            has 0.01.
        adam_scale: learning rate of AdamW's groups as a multiple of lr; also a key of a group.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key, parameters that are not pairs.
    """

    eps_after: ClassVar[bool] = True
    loads_from: ClassVar[tuple[str, ...]] = ("torch",)
    group_defaults: ClassVar[dict[str, Any]] = {
        "momentum": 0.9, "ns_steps": 5, "ns_precision": "bf16",
    }  # fmt: skip

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_scale: float = 1.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, adam_scale)

    def check_group(self, group: dict[str, Any]) -> None:
        check_pairs(group)
        require_int("ns_steps", group["ns_steps"], 1)
        require_choice("ns_precision", group["ns_precision"], NS_PRECISIONS)
        super().check_group(group)

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        if not self.acts_on(group):
            return super().state_shapes(group, shape)
        return {**super().state_shapes(group, shape), "singular_vector": vector_shape(shape)}

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return long_dim(shape)

    @torch.no_grad()
    def step_group_(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not self.acts_on(group):
            super().step_group_(params, group)
            return
        pairs = with_gradients(pairs_of(group["params"]))
        self._decay_([p for pair in pairs for p in pair], group)
        single = [pair for pair in pairs if not _stackable(pair)]
        for B, A in single:
            self._step_pair_(B, A, group)
        for batch in _batches([pair for pair in pairs if _stackable(pair)]):
            self._step_stacks_(batch, group)

    def _step_pair_(self, B: Tensor, A: Tensor, group: dict[str, Any]) -> None:
        states = [self.state[B], self.state[A]]
        with undone_on_error(*states), ExitStack() as parts:
            found: list[tuple[Tensor, Tensor, Tensor]] = []
            for p in (B, A):
                state, dim = self._advanced_state(p, group), long_dim(p.shape)
                X, G, own = parts.enter_context(self.plain_parts(p, dim))
                (M,) = averaged(own, G, group["momentum"])
                Q = _orthogonalized(M, dim, p.shape[dim], self.placement, group)
                u = self._vector(p, own)
                found.append((X, Q, power_step_(X, u, dim, self.placement)))
            (_, _, sigma_B), (_, _, sigma_A) = found
            rate = zero_if_off_(-float(group["lr"]) / (sigma_B + sigma_A + 1))
            for X, Q, _ in found:
                X.add_(Q.mul_(rate))
        for state in states:  # only now: parts of DTensors carry their numbers back
            state["step"] += 1

    def _step_stacks_(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        """As `_step_pair_` of each, in few kernels."""
        factors = [p for pair in pairs for p in pair]
        states, self.placement = [self._advanced_state(p, group) for p in factors], REPLICATED
        grads = Stacks.of([p.grad for p in factors if p.grad is not None])
        averages = averaged(StackedStates(states), grads, group["momentum"])
        dtype = ns_dtype(factors[0].dtype, group)
        (orthogonal,) = orthogonalized_stacks(averages, _schedule(group), NS_EPS, dtype)
        vectors = [self._vector(p, state) for p, state in zip(factors, states, strict=True)]
        sigma = power_steps_(factors, vectors)
        order = [i for stack in orthogonal for i in stack.numbers]
        of_other = torch.stack([sigma[order.index(i ^ 1)] for i in order])
        bounds = torch.split(of_other.add_(sigma).add_(1), [len(s.numbers) for s in orthogonal])
        updates = list(factors)
        for stack, bound in zip(orthogonal, bounds, strict=True):
            Q = stack.X.to(factors[0].dtype)
            torch.div(Q, bound[:, None, None], out=Q)
            for i, update in stack._replace(X=Q).matrices(Q.dtype):
                updates[i] = update
        add_(factors, updates, -float(group["lr"]))
        for state in states:
            state["step"] += 1

    def _vector(self, p: Tensor, state: State) -> Tensor:
        """u of a factor, or its shard."""
        if "singular_vector" not in state:
            u = self.start_vector(p)
            state["singular_vector"] = self.placement.local_shard(u, long_dim(p.shape))
        found: Tensor = state["singular_vector"]
        return found

    def start_vector(self, p: Tensor) -> Tensor:
        """A random u of norm 1 for a factor, the same on every rank."""
        generator = torch.Generator(p.device).manual_seed(param_index(self, p) * SEED_STRIDE)
        wide, shape = torch.promote_types(p.dtype, torch.float32), vector_shape(p.shape)
        u = torch.randn(shape, generator=generator, dtype=wide, device=p.device)
        return u.div_(u.norm())


def _schedule(group: dict[str, Any]) -> list[Coefficients]:
    return list(islice(cycle(COEFFICIENTS), group["ns_steps"]))


def _orthogonalized(
    M: Tensor, dim: int, length: int, placement: Placement, group: dict[str, Any]
) -> Tensor:
    """Q of a momentum, in its dtype; of a shard along `dim`, the same shard."""
    dtype = ns_dtype(M.dtype, group)
    full = placement.all_gather(M.to(dtype), dim, length)
    (Q,) = orthogonalized([full], _schedule(group), NS_EPS, dtype)
    return placement.local_shard(Q, dim).to(M.dtype)


def _stackable(pair: Pair) -> bool:
    return all(prefers_few_kernels(p) and not is_dtensor(p) for p in pair)


def _batches(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Pairs of one dtype and device, of at most `STACK_ENTRIES`."""

    def kind(pair: Pair) -> str:
        grads = [p.grad.dtype for p in pair if p.grad is not None]
        return str([(p.device, p.dtype) for p in pair] + grads)

    for _, same in groupby(sorted(pairs, key=kind), kind):
        batch: list[Pair] = []
        entries = 0
        for pair in same:
            own = sum(p.numel() for p in pair)
            if batch and entries + own > stacks.STACK_ENTRIES:
                yield batch
                batch, entries = [], 0
            batch.append(pair)
            entries += own
        yield batch


def spectron_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of M and u (float32) of a factor; m and v of AdamW for the rest."""
    return w.nbytes + SCALAR * max(w.shape) if w.target else two_moments(w, config)
