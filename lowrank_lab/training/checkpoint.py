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
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError
from lowrank_lab.training.optimizer_state import Decoder, Encoder
from lowrank_lab.training.random_state import random_states, set_random_states

SUMS = "SHA256SUMS"
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
    encoder = Encoder(model, optimizer)
    facts = {
        "step": step, "optimizer": encoder.states(), "groups": encoder.groups(),
        "more": encoder.more(), "extra": extra,
    }  # fmt: skip
    tensors |= {**encoder.tensors, **random_states()}
    with warnings.catch_warnings():  # one process alone writes
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            dcp_save(packed, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
        except CheckpointException as error:  # it is no Exception, and hides its cause
            raise next(iter(error.failures.values()))[0] from None
    (folder / "state.json").write_text(json.dumps(facts))
    sums = "".join(f"{_sum(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
    (folder / SUMS).write_text(sums)
    for file in [*folder.iterdir(), folder]:
        _fsync(file)


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
    Decoder(model, optimizer, tensors).load(facts)
    set_random_states(tensors)
    return facts["step"], facts["extra"]


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
