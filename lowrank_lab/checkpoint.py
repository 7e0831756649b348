"""Checkpoints: tensors by torch.distributed.checkpoint, the rest as JSON, renamed into place.

A checkpoint is a folder `step-00000040`. It is written under another name, fsynced and renamed, so
that a folder with that name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_lab.optim.base import is_quantized

KEPT = 2


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any
) -> Path:
    """Write the checkpoint of `step` updates into `folder`, and drop all but the last KEPT.

    Args:
        extra: anything JSON can hold, given back by `load`.
    """
    # Imported where it is used: it takes as long as half of torch.
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if is_quantized(value):
                parts, context = value.__tensor_flatten__()
                signed, dtype = cast(tuple[bool, torch.dtype], context)
                scalars[f"{name}/{key}"] = {"signed": signed, "dtype": str(dtype)}
                for part in parts:
                    tensors[f"optimizer/{name}/{key}#{part}"] = getattr(value, part)
            elif isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif isinstance(value, list | tuple):  # foreign optimizers keep lists of tensors
                plain = [None if isinstance(v, Tensor) else v for v in value]
                scalars[f"{name}/{key}"] = {"items": plain}
                listed = {f"#{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)}
                tensors |= {f"optimizer/{name}/{key}{place}": v for place, v in listed.items()}
            else:
                scalars[f"{name}/{key}"] = value
    with warnings.catch_warnings():  # that there is one process only is known here
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_save(tensors, checkpoint_id=partial, no_dist=True)
    groups = [
        {k: v for k, v in group.items() if isinstance(v, int | float | str | None)}
        for group in optimizer.param_groups
    ]
    facts = {"step": step, "optimizer": scalars, "groups": groups, "extra": extra}
    (partial / "state.json").write_text(json.dumps(facts))
    for file in [*partial.iterdir(), partial]:
        _fsync(file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _fsync(folder)
    for old in all_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def all_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Put the newest checkpoint's tensors into the model and the optimizer, on their devices.

    Returns:
        The number of updates done, and what was saved as extra; (0, {}) if there is no checkpoint.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    found = all_checkpoints(folder)
    if not found:
        return 0, {}
    facts = json.loads((found[-1] / "state.json").read_text())
    stored = FileSystemReader(found[-1]).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, checkpoint_id=found[-1], no_dist=True)
    model.load_state_dict(
        {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    )
    parameters = dict(model.named_parameters())
    for key, value in {**_tensors_of_optimizer(tensors), **facts["optimizer"]}.items():
        name, _, entry = key.rpartition("/")
        if "#" in entry:
            continue  # a part of a quantized state, put together below
        parameter = parameters[name]
        if isinstance(value, dict) and "items" in value:
            parts = [tensors.get(f"optimizer/{key}#{i}") for i in range(len(value["items"]))]
            value = [p if v is None else v for p, v in zip(parts, value["items"], strict=True)]
        elif isinstance(value, dict):
            value = _quantized(tensors, f"optimizer/{key}", **value)
        on_device = value.to(parameter.device) if isinstance(value, Tensor) else value
        optimizer.state[parameter][entry] = on_device
    for group, kept in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update(kept)  # foreign optimizers count steps there
    return facts["step"], facts["extra"]


def _tensors_of_optimizer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "optimizer/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _quantized(tensors: dict[str, Tensor], key: str, signed: bool, dtype: str) -> Tensor:
    """A state of torchao's 8-bit optimizers, from its parts."""
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = [tensors[f"{key}#{part}"] for part in OptimState8bit.tensor_attrs]
    shown = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
    state: Tensor = OptimState8bit(*parts, signed, shown[dtype])
    return state


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
