"""Which layers of a model a method acts on: those that a pattern matches, or all linear ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lowrank_lab.config import ALL_LINEAR, TARGETS
from lowrank_lab.layers.base import FactorizedLinear

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, FactorizedLinear)
# Customary names of the layer that computes a model's outputs
HEADS = ("lm_head", "head", "classifier", "score", "qa_outputs", "embed_out")

Linear = nn.Linear | FactorizedLinear


def target_layers(model: nn.Module, target: str = TARGETS) -> Iterator[tuple[str, Linear]]:
    """Names and modules of the linear or factorised layers that match `target`.

    Args:
        model: any module.
        target: regular expression, searched in the full name of each layer; or `all-linear`, every
            layer except heads and those that share their weight (`heads`, `is_tied`).

    Raises:
        ValueError: `target` isn't a regular expression.
    """
    yield from matching_layers(model, target, LINEAR)


def matching_layers(
    model: nn.Module, target: str, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, Any]]:
    """`target_layers` for other kinds of layers."""
    matches = matcher(model, target, kinds)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and matches(name):
            yield name, module


def matcher(
    model: nn.Module, target: str, kinds: tuple[type[nn.Module], ...] = LINEAR
) -> Callable[[str], bool]:
    """A function of a name: whether `target` matches it; `all-linear` only layers of `kinds`."""
    pattern = _compiled(target)
    if target != ALL_LINEAR:
        return lambda name: pattern.search(name) is not None
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    left_out, owners = heads(model, layers), _owners(model)
    names = {n for n, m in layers if m not in left_out and not is_tied(m, owners)}
    return names.__contains__


def _compiled(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target)
    except (TypeError, re.error, OverflowError, RecursionError) as error:
        allowed = f"{ALL_LINEAR!r} or a regular expression: {error}"
        raise ValueError(f"target: {target!r} is not allowed; {allowed}") from None


def heads(model: nn.Module, layers: list[tuple[str, Any]]) -> list[nn.Module]:
    """The layers that compute the outputs of a model.

    They are those that `get_output_embeddings` returns (Hugging Face) and those with a customary
    name (`HEADS`); without either, the last layer. Layers that repeat in
    the blocks of a stack are not heads.
    """
    patterns = Counter(_pattern(name) for name, _ in layers)
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    embeddings = [get() for get in getters if callable(get)]
    once = [(name, m) for name, m in layers if patterns[_pattern(name)] == 1]
    named = [m for name, m in once if name.rpartition(".")[2] in HEADS]
    found = [m for m in embeddings if m is not None] + named
    return found or [m for _, m in once[-1:] if m is layers[-1][1]]


def _pattern(name: str) -> str:
    """A layer's name without the numbers of the blocks that contain it."""
    path, dot, last = name.rpartition(".")
    return re.sub(r"\b\d+\b", "*", path) + dot + last


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules, by their names, have each parameter."""
    modules = model.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, m in modules for p in m.parameters(recurse=False))


def is_tied(layer: nn.Module, owners: Counter[int]) -> bool:
    """Whether a layer shares a matrix with another module, or is in a model under two names."""
    return any(owners[id(p)] > 1 for p in layer.parameters() if p.ndim > 1)


def describe_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LINEAR) -> str:
    """The linear layers of a model, in a few words; if there are none, its other layers."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    counts = Counter(re.sub(r"\b\d+\b", "*", name) or "the model itself" for name, _ in layers)
    if counts:
        shown = [name if n == 1 else f"{name} ({n}×)" for name, n in counts.most_common(12)]
        return f"the model has {', '.join(shown)}" + (", …" if len(counts) > 12 else "")
    owners = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    types = sorted({type(m).__name__ for m in owners})
    return f"the model has none, but {', '.join(types) or 'no parameters either'}"
