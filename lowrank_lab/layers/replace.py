"""Replace the linear layers of a model by factorised ones (`factorize`), and back (`to_dense_`)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lowrank_lab.config import TARGETS, nearest
from lowrank_lab.layers.base import FactorizedLinear, require_dense_weights
from lowrank_lab.layers.dense import dense_kinds, is_dense, why_not
from lowrank_lab.layers.low_rank import LowRankLinear
from lowrank_lab.layers.skipped import described_matches, listed, skipped_layers
from lowrank_lab.layers.spec import KINDS, layers_of, record_
from lowrank_lab.layers.targets import matcher
from lowrank_lab.layers.trained import looks_trained

Model = TypeVar("Model", bound=nn.Module)

# Attributes of a module that hold the hooks of its calls; handles refer to these dictionaries.
CALL_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def factorize(
    model: Model,
    kind: str | Mapping[str, Any] = "low-rank",
    *,
    rank: int | None = None,
    target: str = TARGETS,
    **options: Any,
) -> Model:
    """Replace each linear layer that matches `target` by a factorised layer, in place.

    Replaced are nn.Linear, its subclasses that compute as it does, and Conv1D of transformers
    (GPT-2). The new layers keep `requires_grad` (LoRA's factors always train), forward and backward
    hooks, the training mode and attributes. Build the optimizer after this call. Every factorised
    layer has a `weight` for code that reads it: W, formed when an operation uses it (refused by
    CoLA's, which have no W).

    The factorisation is written into the config of a transformers model, so that `load_pretrained`
    loads what `save_pretrained` or the Trainer saves. Pass the whole model, not a submodule.

    Args:
        model: any module; layers that are not linear stay as they are.
        kind: low-rank | lora | sltrain | cola; or the result of `factorization`, without the
            arguments that follow: makes the same layers, whose weights are to be loaded afterwards.
        rank: r, at most min(m, n) of every layer that matches.
        target: regular expression, searched in the full name of each layer; or `all-linear`, every
            layer but the head and those that share their weight (`targets.heads`).
        options: further arguments of the layer (`alpha`, `init`, …).

    Returns:
        The same model.

    Raises:
        ValueError: an unknown kind or option, a pattern that matches nothing, a rank too large, a
            layer that shares its weight with another module. The model is then unchanged.

    Warns:
        UserWarning: a layer matches but stays dense (`skipped_layers` gives the reasons); new
            factors replace weights that look trained (`trained.py`; not with an explicit `init`);
            a weight has a rank below r, with `init="spectral"`.
    """
    if isinstance(kind, Mapping):
        if rank is not None or options or target != TARGETS:
            raise ValueError("rank: with a factorisation no other argument is allowed")
        return _factorize_as(model, kind)
    _check_request(kind, rank, options)
    matches = matcher(model, target, (*dense_kinds(), FactorizedLinear))
    skipped = skipped_layers(model, target)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if matches(name) and is_dense(module) and why_not(module) is None
    ]
    if model in [m for _, m in found]:
        raise ValueError("model: a bare linear layer can't be replaced in place")
    if not found:
        instead = described_matches(model, target)
        raise ValueError(f"target: {target!r} matches no linear layer of the model{instead}")
    _warn_trained(kind, [m for _, m in found], options)
    replaced = [(n, _made(model, n, m, kind, {"rank": rank, **options})) for n, m in found]
    if skipped:
        warnings.warn(f"target: left as they are: {listed(skipped)}", stacklevel=2)
    _put(model, replaced)
    return model


def to_dense_(model: Model) -> Model:
    """Replace each factorised layer by a dense layer of the original class and same W, in place.

    W is computed in float64 and rounded once; it requires a gradient if any factor does. The bias,
    forward and backward hooks, the training mode and attributes are kept. Build a new optimizer
    after this call.

    Returns:
        The same model.

    Raises:
        ValueError: the model is itself a factorised layer, or has one without a dense weight
            (CoLA). Nothing has changed then.
    """
    if isinstance(model, FactorizedLinear):
        raise ValueError("model: a bare factorised layer can't be replaced in place")
    require_dense_weights(model)
    _put(model, [
        (name, _dense(layer)) for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLinear)
    ])  # fmt: skip
    return model


def _check_request(kind: str, rank: int | None, options: Mapping[str, Any]) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not allowed; {nearest(kind, KINDS)}")
    if rank is None:
        raise ValueError("rank: None is not allowed; from 1 to the smaller side of the layers")
    known = list(inspect.signature(KINDS[kind]).parameters)[2:]
    for name in options:
        if name not in known:
            raise ValueError(f"options: {name!r} is not allowed; {kind} takes {', '.join(known)}")


def _factorize_as(model: Model, spec: Mapping[str, Any]) -> Model:
    """Make the layers of a factorisation; their weights are to be loaded afterwards."""
    modules, replaced = dict(model.named_modules()), []
    for name, facts in layers_of(spec):
        module = modules.get(name)
        if module is None or not is_dense(module):
            what = "it has none" if module is None else f"it is a {type(module).__name__}"
            raise ValueError(f"layers: {name!r} is no linear layer of this model: {what}")
        if reason := why_not(module):
            raise ValueError(f"layers: {name!r} can't be factorised: {reason}")
        options = {key: value for key, value in facts.items() if key not in ("kind", "scale")}
        layer = _made(model, name, module, facts["kind"], options)
        layer.scale = facts["scale"]
        replaced.append((name, layer))
    _put(model, replaced)
    return model


def _made(
    model: nn.Module, name: str, linear: nn.Module, kind: str, options: Mapping[str, Any]
) -> FactorizedLinear:
    """The factorised layer for a dense one; errors and warnings name the layer."""
    for other_name, other in model.named_modules(remove_duplicate=False):
        shared = any(p is linear.weight for p in other.parameters(recurse=False))
        if shared and other_name != name:
            raise ValueError(f"target: {name} shares its weight with {other_name}; exclude it")
    try:
        layer: FactorizedLinear = KINDS[kind](linear, **options)
    except ValueError as error:
        raise ValueError(f"{error} (layer {name})") from None
    if isinstance(layer, LowRankLinear) and layer.drawn_rows:
        found = layer.rank - layer.drawn_rows
        warnings.warn(
            f"init: 'spectral' of {name}, whose weight has rank {found}: the other "
            f"{layer.drawn_rows} rows of A are drawn, as zero factors would never train",
            stacklevel=3,
        )
    layer.carried = _carry_over(linear, layer, vars(nn.Linear(1, 1, device="meta")).keys())
    return layer


def _dense(layer: FactorizedLinear) -> nn.Module:
    """The dense layer for a factorised one."""
    dense: Any = layer.dense_class.__new__(layer.dense_class)
    nn.Module.__init__(dense)
    parts = [p for p in (layer.B, layer.A, layer.other()) if p is not None]
    W = layer.oriented(layer.merged_weight()).contiguous()
    dense.weight = nn.Parameter(W, any(p.requires_grad for p in parts))
    dense.register_parameter("bias", layer.bias)
    if not layer.transposed:
        dense.in_features, dense.out_features = layer.in_features, layer.out_features
    kept = vars(layer).keys() - set(layer.carried)
    _carry_over(layer, dense, kept)
    found: nn.Module = dense
    return found


def _carry_over(source: nn.Module, to: nn.Module, own: Any) -> tuple[str, ...]:
    """Copy the hooks, the training mode and all attributes except `own` from a module to another.

    Returns:
        The names of these attributes.
    """
    for name in CALL_HOOKS:  # the dictionaries themselves: handles still remove their hooks
        vars(to)[name] = vars(source)[name]
    to.training = source.training
    names = [name for name in vars(source) if name not in own and name not in vars(to)]
    for name in names:
        vars(to)[name] = vars(source)[name]
    return tuple(names)


def _put(model: nn.Module, replaced: list[tuple[str, Any]]) -> None:
    """Put modules at the places of others, at all names of each."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, layer in replaced:
        for place in places[id(model.get_submodule(name))]:
            model.set_submodule(place, layer)
    record_(model)


def _warn_trained(kind: str, layers: list[nn.Module], options: Mapping[str, Any]) -> None:
    """Warn if a kind that starts from new factors replaces weights that look trained."""
    weights = [m.weight for m in layers if isinstance(m.weight, Tensor)]
    if kind == "lora" or "init" in options or not looks_trained(weights):
        return
    keep = 'init="spectral" keeps their best approximation' if kind == "low-rank" else (
        'kind="lora" keeps them'
    )  # fmt: skip
    new = inspect.signature(KINDS[kind]).parameters["init"].default
    warnings.warn(
        f"kind: {kind!r} starts from new factors, but the weights look trained and are thrown "
        f'away; {keep} (init="{new}" if that is meant)',
        stacklevel=3,
    )
