"""The singular values of any model's weights as a table: `lowrank_lab.spectra`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lowrank_lab.analysis.spectra import (
    Factor,
    effective_rank,
    factor_health,
    gradient_singular_values,
    matrices,
    singular_values,
    stable_rank,
    update_singular_values,
)
from lowrank_lab.distributed.dtensors import full_tensor, is_dtensor
from lowrank_lab.layers import FactorizedLinear

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "layer", "kind", "shape", "rank", "effective_rank", "stable_rank", "condition_B",
    "condition_A", "imbalance", "singular_values", "update", "gradient",
)  # fmt: skip


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def spectra(
    model: nn.Module, target: str = "", *, start: Mapping[str, Tensor] | None = None
) -> pd.DataFrame:
    """Singular values of the weights of a model, one row per layer.

    Covers factorised layers and every other module with a matrix as `weight`, except embeddings:
    nn.Linear and its subclasses, and GPT-2's Conv1D. A layer without a dense weight (CoLA) has two
    rows, `name[B]` and `name[A]`, of its factors. The model is not changed.

    Args:
        model: any module, on any device. Weights sharded by FSDP2 are gathered one at a time, so
            all processes have to call this.
        target: regular expression, searched in the full name of each layer; all by default.
        start: an earlier `state_dict()` of the model, cloned, for `update`.

    Returns:
        A table with the columns

        - `layer`, `kind` (class), `shape` (of the weight), `rank` (of factors, otherwise missing);
        - `singular_values`: float32 array, descending, r values for a product of factors;
          `effective_rank` and `stable_rank` of them;
        - `condition_B`, `condition_A` (infinite where rank-deficient) and `imbalance` of factors;
        - `update`: singular values of W − W₀, with `start`; not of parametrised layers;
        - `gradient`: singular values of the gradient step in W, where there are gradients; without
          SLTrain's sparse part, and not of parametrised layers.

        A layer with entries that are not finite has NaN in place of numbers. For seaborn,
        `table.explode(column)` of an array column gives one row per singular value.

    Raises:
        ValueError: no layer matches, a layer is on the meta device, or `start` lacks its weight.
    """
    import pandas as pd

    rows = [row for name, layer in _layers(model, target) for row in _rows(name, layer, start)]
    if not rows:
        raise ValueError(f"target: {target!r} is not allowed; no linear layer has such a name")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _layers(model: nn.Module, target: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if re.search(target, name) and (isinstance(module, FactorizedLinear) or _is_dense(module)):
            yield name, module


def _is_dense(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own as `weight`, and is no embedding."""
    own = "weight" in module._parameters or is_parametrized(module, "weight")
    with _evaluated(module):
        weight = getattr(module, "weight", None) if own else None
    return weight is not None and weight.ndim == 2 and not isinstance(module, EMBEDDINGS)


@torch.no_grad()
def _rows(
    name: str, module: nn.Module, start: Mapping[str, Tensor] | None
) -> Iterator[dict[str, Any]]:
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(f"model: {name} is not allowed; its weight is on the meta device")
    with _evaluated(module):
        layer: Any = _gathered(module)
        computed = is_parametrized(module)  # what its parameters are to the weight is not known
        before = None if start is None or computed else _start_of(name, layer, start)
        for part_name, part in matrices(name, layer):
            own = before
            if before is not None and isinstance(part, Factor):
                own = {"weight": before[part.part]}
            row = {"layer": part_name, "kind": type(module).__name__}
            yield row | _facts(part, own, moves=not computed)


def _facts(layer: Any, start: dict[str, Tensor] | None, moves: bool) -> dict[str, Any]:
    """The columns of a row but `layer` and `kind`.

    Args:
        start: the layer's earlier state.
        moves: whether a step moves the weight by its gradient.
    """
    row: dict[str, Any] = {}
    factorized = isinstance(layer, FactorizedLinear)
    row["shape"] = tuple((layer.dense_weight() if factorized else layer.weight).shape)
    row["rank"] = layer.rank if factorized else None
    finite = all(bool(p.isfinite().all()) for p in layer.parameters())
    values = singular_values(layer) if finite else torch.full((1,), torch.nan)
    row["singular_values"] = values.cpu().numpy()
    row["effective_rank"] = float(effective_rank(values)) if finite else torch.nan
    row["stable_rank"] = float(stable_rank(values)) if finite else torch.nan
    if not finite:
        return row
    if factorized:
        row |= factor_health(layer)._asdict()
    if start is not None:
        row["update"] = update_singular_values(layer, start).cpu().numpy()
    gradient = gradient_singular_values(layer) if moves else None
    row["gradient"] = None if gradient is None else gradient.cpu().numpy()
    return row


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluate parametrizations: spectral_norm's change their buffers in training mode."""
    inner = getattr(module, "parametrizations", None)
    training = [] if inner is None else [m for m in inner.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _gathered(module: nn.Module) -> nn.Module:
    """The module, or a copy with full weights and gradients where these are DTensors."""
    if not any(map(is_dtensor, module._parameters.values())):
        return module
    full = copy.copy(module)
    full._parameters = {name: _full(p) for name, p in module._parameters.items()}
    return full


def _full(parameter: Any) -> Any:
    if not is_dtensor(parameter):
        return parameter
    full = nn.Parameter(full_tensor(parameter), requires_grad=parameter.requires_grad)
    full.grad = None if parameter.grad is None else full_tensor(parameter.grad)
    return full


def _start_of(name: str, layer: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of an earlier state_dict of the model that belongs to a layer."""
    prefix = f"{name}." if name else ""
    missing = [prefix + key for key in layer.state_dict() if prefix + key not in start]
    if missing:
        raise ValueError(f"start: no {missing[0]}; state_dict() of the same model is allowed")
    return {key: start[prefix + key] for key in layer.state_dict()}
