"""Modules that match a target and that `factorize` leaves as they are, with the reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lowrank_lab.config import ALL_LINEAR, TARGETS
from lowrank_lab.layers.base import FactorizedLinear
from lowrank_lab.layers.dense import dense_kinds, has_matrix, is_dense, why_not
from lowrank_lab.layers.targets import matcher


def skipped_layers(model: nn.Module, target: str = TARGETS) -> dict[str, str]:
    """Modules that match `target` and have a matrix that `factorize` leaves dense, with the reason.

    Embeddings, convolutions and norms are left out: a target is not meant for them.
    """
    found: dict[str, str] = {}
    matches = matcher(model, target, (*dense_kinds(), FactorizedLinear))
    for name, module in model.named_modules():
        known = isinstance(module, FactorizedLinear | ParametrizationList)
        if known or not has_matrix(module):
            continue
        names = [name, *(f"{name}.{p}" for p, _ in module.named_parameters(recurse=False))]
        if is_dense(module):
            matched = matches(name)
        else:
            matched = target == ALL_LINEAR or any(map(matches, names))
        if matched and (reason := why_not(module)):
            found[name] = reason
    return found


def described_matches(model: nn.Module, target: str) -> str:
    """What a pattern matches instead of linear layers, in a few words."""
    skipped = skipped_layers(model, target)
    if skipped:
        return f"; it matches {listed(skipped)}"
    others = [
        f"{name} ({type(m).__name__})" for name, m in model.named_modules()
        if name and re.search(target, name)
    ]  # fmt: skip
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"; it matches {', '.join(others[:3])}{more}" if others else ""


def listed(skipped: Mapping[str, str]) -> str:
    """Names by reason: `a, b (reason); c (another)`."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
