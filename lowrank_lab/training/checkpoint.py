"""Checkpoints: tensors by torch.distributed.checkpoint, the rest as JSON, renamed into place.

A checkpoint is a folder `step-00000040` of safetensors, JSON and SHA256SUMS (`sha256sum -c` reads
it); nothing in it is ever unpickled. It is written under another name, fsynced and renamed, so that
a folder with that name was complete once; its checksums show later damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError
from lowrank_lab.layers import current_name
from lowrank_lab.optim.adam import is_quantized

SUMS = "SHA256SUMS"
PLAIN = (int, float, str, type(None))  # what JSON keeps as it is
BEST = "best.json"  # beside the checkpoints: which of them is the best


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    kept: int = 2,
    loss: float | None = None,
    **extra: Any,
) -> Path:
    """Write the checkpoint of `step` updates into `folder`; drop all but the last and the best.

    Args:
        kept: how many of the latest checkpoints stay.
        loss: on held-out text; the checkpoint with the lowest is marked in best.json and stays.
        extra: anything that JSON can represent; `load` returns it.

    Raises:
        OSError: it can't be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    for left in folder.glob(".partial-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write(partial, step, model, optimizer, extra)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _fsync(folder)
    stay = {*all_checkpoints(folder)[-kept:], _mark_best(folder, target, loss)}
    for old in all_checkpoints(folder):
        if old not in stay:
            shutil.rmtree(old)
    return target


def _mark_best(folder: Path, newest: Path, loss: float | None) -> Path | None:
    """The checkpoint with the lowest loss, which may be the newest; noted in best.json."""
    place = folder / BEST
    best: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # missing or damaged: written again below
        best = json.loads(place.read_text())
    if loss is not None and loss <= best.get("validation_loss", loss):
        best = {"checkpoint": newest.name, "validation_loss": loss}
        partial = folder / f".{BEST}"
        partial.write_text(json.dumps(best))
        _fsync(partial)
        partial.replace(place)
    return folder / best["checkpoint"] if best else None


def _write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
) -> None:
    """The files of a checkpoint, on the disk when this returns."""
    # Imported where it is used: it takes as long as half of torch.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    scalars: dict[str, Any] = {}
    lost: set[str] = set()
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if odd := {key for key, value in state.items() if not _storable(value)}:
            lost |= odd
            continue  # a part of a state is none
        for key, value in state.items():
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
    for place, group in enumerate(optimizer.param_groups):
        counted = {k: v for k, v in group.items() if isinstance(v, Tensor) and "lr" not in k}
        tensors |= {f"groups/{place}/{k}": v.clone() for k, v in counted.items()}
    with warnings.catch_warnings():  # one process alone writes
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            dcp_save(packed, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
        except CheckpointException as error:  # it is no Exception, and hides its cause
            raise next(iter(error.failures.values()))[0] from None
    groups = [
        {k: v for k, v in group.items() if isinstance(v, PLAIN)} for group in optimizer.param_groups
    ]
    facts = {"step": step, "optimizer": scalars, "groups": groups, "extra": extra}
    if lost:
        kind = type(optimizer).__name__
        facts["lost"] = f"{kind}'s {', '.join(sorted(lost))} can't be stored; it starts again"
    (folder / "state.json").write_text(json.dumps(facts))
    sums = "".join(f"{_sum(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
    (folder / SUMS).write_text(sums)
    for file in [*folder.iterdir(), folder]:
        _fsync(file)


def _storable(value: Any) -> bool:
    """Whether a state is a tensor, a plain value, or a list of such."""
    if isinstance(value, list | tuple):
        return all(isinstance(v, (Tensor, *PLAIN)) or _is_plain_list(v) for v in value)
    return isinstance(value, (Tensor, *PLAIN))


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, PLAIN) for v in value)


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, in a few words; empty if nothing is."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {line[66:]: line[:64] for line in lines}
        if "state.json" not in sums:
            return f"{SUMS} is cut off"
        for name in sums:
            if _sum(checkpoint / name) != sums[name]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"{SUMS} can't be read: {error}"
    return ""


def newest(folder: Path, report: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest undamaged checkpoint; None if there is no checkpoint.

    Args:
        report: called with one line for each damaged checkpoint that is skipped.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    found = all_checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = fault(checkpoint)
        if not wrong:
            return checkpoint
        report(f"{checkpoint} is damaged: {wrong}; the one before it is used")
    if found:
        allowed = "all of them are damaged; remove the folder to train from the start"
        raise InputError("checkpoints", str(folder), allowed)
    return None


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None] = warnings.warn,
) -> tuple[int, dict[str, Any]]:
    """Load the newest undamaged checkpoint into model and optimizer, on their devices.

    Args:
        report: of `newest`.

    Returns:
        The number of updates done, and what was saved as extra; (0, {}) if there is no checkpoint.

    Raises:
        InputError: of `newest`.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    found = newest(folder, report)
    if found is None:
        return 0, {}
    facts = json.loads((found / "state.json").read_text())
    reader = HuggingFaceStorageReader(str(found))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    model.load_state_dict(
        {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    )
    parameters = dict(model.named_parameters())
    for key, value in {**_tensors_of_optimizer(tensors), **facts["optimizer"]}.items():
        name, _, entry = key.rpartition("/")
        if "#" in entry:
            continue  # a part of a quantized state, put together below
        parameter = parameters[name if name in parameters else current_name(name)]
        if isinstance(value, dict) and "items" in value:
            parts = [tensors.get(f"optimizer/{key}#{i}") for i in range(len(value["items"]))]
            value = [p if v is None else v for p, v in zip(parts, value["items"], strict=True)]
        elif isinstance(value, dict):
            value = _quantized(tensors, f"optimizer/{key}", **value)
        on_device = value.to(parameter.device) if isinstance(value, Tensor) else value
        optimizer.state[parameter][entry] = on_device
    for group, kept in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update(kept)  # foreign optimizers count steps there
    for key, value in tensors.items():
        if key.startswith("groups/"):
            _, place, entry = key.split("/", 2)
            group = optimizer.param_groups[int(place)]
            group[entry] = value.to(group["params"][0].device)
    if "lost" in facts:
        report(facts["lost"])
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


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
