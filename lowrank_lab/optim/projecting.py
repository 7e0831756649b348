"""Products with projections: the projected gradient, and the update in W that comes of it.

A gradient G is m×n; L is m×r, R is n×r; N is shaped like the projected gradient. Stacks of many
matrices have stacks of projections.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowrank_lab.optim.adam import state_dtype, to_state_precision
from lowrank_lab.optim.stacks import Stacks, Weights, project_stacks


def project(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Lᵀ G, G R or Lᵀ G R."""
    # For both sides (Lᵀ G) R, as in galore-torch: right after a refresh, the other order differs in
    # the off-diagonal entries. They are rounding noise, which Adam amplifies.
    G = G if left is None else left.T @ G
    return G if right is None else G @ right


def projected_gradient(G: Any, left: Any, right: Any, group: dict[str, Any]) -> Any:
    """`project` in the dtype of Adam's moments; of stacks, their stacks."""
    if isinstance(G, Stacks):
        return project_stacks(G, left, right, state_dtype(G.flat.dtype, group))
    return to_state_precision(project(G, left, right), group)


def project_back_add_(W: Any, N: Any, left: Any, right: Any, alpha: float) -> Any:
    """W ← W + alpha · (L N, N Rᵀ or L N Rᵀ), in place; the product in the projection's dtype.

    W may be a stack, in the projections' dtype.
    """
    if isinstance(W, Weights):  # when the update ends, in few kernels
        W.product = (N, left, right, alpha)
        return W
    P = right if left is None else left
    assert P is not None
    N = N.to(P.dtype)
    X = N if left is None else left
    Y = N if right is None else right.mT if left is None else N @ right.mT
    if W.ndim > 2:  # a stack
        return W.baddbmm_(X, Y, alpha=alpha)
    return W.addmm_(X, Y, alpha=alpha) if W.dtype == P.dtype else W.add_(X @ Y, alpha=alpha)
