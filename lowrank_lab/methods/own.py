"""Methods of one's own: `register_method`, and the files that call it."""

from __future__ import annotations

import os
import re
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
from lowrank_lab.optim.state_bytes import StateRule, adamw_states

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
    state_bytes: StateRule | None = None,
    colour: str | None = None,
) -> Method:
    """Add a method of one's own, which studies, tables, figures and the command line then know.

    Args:
        name: letters, digits, - and _; replaces a method of that name.
        optimizer: (target parameters, other parameters, configuration) → optimizer; AdamW by
            default. Its options are in `config.method_options`, the rank in `config.rank`.
        layers: kind of factorised layer (`layers.KINDS`), None for dense weights.
        lr: default peak learning rate.
        defaults: the method's options with their defaults, which decide what values are allowed.
        state_bytes: (weight, configuration) → bytes of its optimizer states
            (`optim.state_bytes.Weight`), for memory by formula; without it, by simulation only.
        colour: of its curves, as #RRGGBB.

    Raises:
        ValueError: an unknown kind of layer, or a name or colour that isn't one.
    """
    if layers is not None and layers not in KINDS:
        raise ValueError(f"layers: {layers!r} is not allowed; {nearest(layers, KINDS)}")
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"name: {name!r} is not allowed; letters, digits, - and _")
    if colour is not None and not re.fullmatch("#[0-9A-Fa-f]{6}", colour):
        raise ValueError(f"colour: {colour!r} is not allowed; #RRGGBB")
    scaled = layers is not None and KINDS[layers].has_dense_weight
    options = {
        **adam_options(eps=1e-8),
        **({"alpha": Option.number(None, 1e-6, 1e6)} if scaled else {}),
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
        init="kaiming" if scaled else None,
        options=options,
        layer_options=("alpha",) if scaled else (),
        state_bytes=state_bytes if optimizer else state_bytes or adamw_states,
        colour=colour,
    )
    return METHODS[name]


def load_own_methods(files: str | None = None) -> None:
    """Run the Python files in $LOWRANK_LAB_METHODS, which register methods of one's own.

    The command line and the notebooks of a study then know them.

    Args:
        files: paths separated by os.pathsep; the variable is set to them.

    Raises:
        InputError: a file does not exist.
    """
    named = files if files is not None else os.environ.get(OWN_METHODS, "")
    for path in filter(None, named.split(os.pathsep)):
        if not Path(path).is_file():
            raise InputError(OWN_METHODS, path, "there is no such file")
        runpy.run_path(path)
    if files is not None:
        os.environ[OWN_METHODS] = files
