"""Methods of one's own: `register_method`, and the files that call it."""

from __future__ import annotations

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_lab.config import InputError, nearest
from lowrank_lab.layers import KINDS
from lowrank_lab.methods.method import Method
from lowrank_lab.methods.optimizers import OptimizerBuilder, adamw
from lowrank_lab.methods.options import ByWidth, Option, adam_options
from lowrank_lab.methods.registry import METHODS

OWN_METHODS = "LOWRANK_LAB_METHODS"


def register_method(
    name: str,
    *,
    optimizer: OptimizerBuilder | None = None,
    layers: str | None = None,
    lr: float = 5e-3,
    defaults: Mapping[str, Any] | None = None,
    summary: str = "a method of one's own",
    source: str = "your own",
) -> Method:
    """Add a method of one's own: studies, tables, figures and the command line then know it.

    Args:
        name: what to call it; a name that is there is replaced.
        optimizer: (target parameters, other parameters, resolved configuration) → optimizer; AdamW
            by default. Its options are in `config.method_options`, the rank in `config.rank`.
        layers: kind of factorised layer (`layers.KINDS`), None for dense weights.
        lr: default peak learning rate.
        defaults: the method's options with their defaults; numbers stay numbers.

    Raises:
        ValueError: an unknown kind of layer, or a name that couldn't be typed on a command line.
    """
    if layers is not None and layers not in KINDS:
        raise ValueError(f"layers: {layers!r} is not allowed; {nearest(layers, KINDS)}")
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"name: {name!r} is not allowed; letters, digits, - and _")
    options = {
        **adam_options(eps=1e-8),
        **({"alpha": Option.number(None, 1e-6, 1e6)} if layers else {}),
        **{key: Option.like(value) for key, value in (defaults or {}).items()},
    }
    METHODS[name] = Method(
        name=name,
        summary=summary,
        source=source,
        optimizer=optimizer or adamw,
        lr=ByWidth({1: lr}),
        layers=layers,
        uses_rank=True,
        init="kaiming" if layers else None,
        options=options,
        layer_options=("alpha",) if layers else (),
    )
    return METHODS[name]


def load_own_methods(files: str | None = None) -> None:
    """Run Python files that register methods of one's own: those in $LOWRANK_LAB_METHODS.

    So the command line and the notebooks of a study know them too.

    Args:
        files: paths with os.pathsep between, instead of the variable, which is then set to them.

    Raises:
        InputError: there is no such file.
    """
    named = files if files is not None else os.environ.get(OWN_METHODS, "")
    for path in filter(None, named.split(os.pathsep)):
        if not Path(path).is_file():
            raise InputError(OWN_METHODS, path, "there is no such file")
        runpy.run_path(path)
    if files is not None:
        os.environ[OWN_METHODS] = files
