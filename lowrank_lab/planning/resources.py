"""Memory, disk and FLOPs of a run, estimated before it starts, and those of the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.memory.formulas import (
    GB,
    MIB,
    activation_bytes,
    by_formula,
    dense_activation_bytes,
    element_bytes,
    flops_per_token,
    matrices,
    weights,
)
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.planning.simulate import simulate
from lowrank_lab.training.preflight import device_of

# A kernel with torch and matplotlib loaded, and papermill beside it: resident bytes, as measured.
PROCESS_BYTES = 700 * MIB
# Up to this, the quick estimate (which is meant to be too high) is taken: a simulation takes
# seconds, and the process outweighs what it would say.
QUICK_BYTES = 512 * MIB
NOTEBOOK_BYTES = 1 * MIB  # an executed notebook with its figures, and its log
METRICS_ROW, SPECTRA_ROW, PER_VALUE = 450, 400, 20  # bytes in the records

Source = Literal["simulated", "formula"]


@dataclass(frozen=True)
class Resources:
    """Upper bounds in bytes on memory, device memory and disk of a run, and its FLOPs."""

    memory: int
    device: int
    disk: int
    kept: int  # of disk, after the run
    source: Source  # of the memory
    held: int  # bytes of weights and optimizer states
    flops: float  # of all forward and backward passes of its training

    @property
    def words(self) -> str:
        return f"{self.memory / GB:.2f} GB of memory, {self.disk / GB:.3f} GB of disk"


def resources_of_each(
    configs: Iterable[ResolvedConfig], cuda: bool | None = None
) -> Iterator[Resources]:
    """Resources per configuration; those that differ in seed and lr alone are estimated once.

    Args:
        cuda: on a CUDA device, or on a CPU; by default as `device_of` decides here.
    """
    known: dict[str, Resources] = {}
    for config in configs:
        key = config.override(seed=0, lr=1.0).model_dump_json()
        if key not in known:
            known[key] = resources_of(config, cuda)
        yield known[key]


def resources_of(config: ResolvedConfig, cuda: bool | None = None) -> Resources:
    """Resources of one configuration."""
    held, quick = _quick_bytes(config)
    flops = flops_per_token(config) * config.tokens_per_step * config.total_steps
    if cuda is None:
        cuda = device_of(config).type == "cuda"
    source: Source = "formula"
    if quick > QUICK_BYTES:
        # not of a method of one's own that looks at values, which a simulation hasn't
        with suppress(RuntimeError, NotImplementedError):
            quick = simulate(_in_two_pieces(config), "cuda" if cuda else "cpu").peak.total
            source = "simulated"
    # the last ones, the best one, and one that is being written
    checkpoints = (config.keep_latest + 2) * held
    records = _record_bytes(config) + NOTEBOOK_BYTES
    trained = element_bytes(config) * sum(w.numel() for w in weights(config))
    kept = records + (checkpoints if config.keep_after_finish else trained)
    memory, device = (2 * PROCESS_BYTES, quick) if cuda else (PROCESS_BYTES + quick, 0)
    return Resources(memory, device, max(checkpoints + records, kept), kept, source, held, flops)


def _in_two_pieces(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration with at most two micro-batches: further ones repeat the second."""
    pieces = min(config.gradient_accumulation, 2)
    batch = config.batch // config.gradient_accumulation * pieces
    return config.override(batch=batch, gradient_accumulation=pieces)


def _quick_bytes(config: ResolvedConfig) -> tuple[int, int]:
    """Bytes of weights and states (a checkpoint's), and an upper estimate of the peak.

    The peak is the sum of weights, states, gradients, activations of dense layers and of factors,
    logits with their gradients, and temporaries of the largest matrix.
    """
    b, found = element_bytes(config), list(weights(config))
    try:
        rest = by_formula(config)
        held = rest.weights + rest.optimizer_states
    except InputError:  # states that no formula knows: as many as Adam's, in float32
        held = sum((b + 8 * w.trains) * w.numel() for w in found)
    gradients = sum(b * w.numel() for w in found if w.trains)
    tokens = config.batch // config.gradient_accumulation * config.sequence_length
    layers = [(m, n) for m, n, target in matrices(config) if target]
    factors = (config.rank or 0) * len(layers) if METHODS[config.method].layers else 0
    logits = 4 * tokens * config.size.vocab_size
    largest = max(w.numel() for w in found)
    whole = max((m * n for m, n in layers), default=0)
    activations = activation_bytes(config)
    if activations is None:
        activations = dense_activation_bytes(config) + b * tokens * factors
    return held, held + gradients + activations + 3 * logits + 4 * (6 * max(largest, whole))


def _record_bytes(config: ResolvedConfig) -> int:
    """metrics.jsonl and spectra.jsonl."""
    steps = config.total_steps
    recorded = matrices(config.override(target=config.spectra_layers))
    rows = sum(SPECTRA_ROW + 4 * PER_VALUE * min(m, n) for m, n, kept in recorded if kept)
    times = steps // config.spectra_every + 2
    return steps * METRICS_ROW + times * rows


def machine_memory() -> int | None:
    """Bytes of memory that this machine or control group has; None where it is unknown."""
    limits = [_number(path) for path in _limit_files()]
    with suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((n for n in limits if n is not None and n > 0), default=None)


def _limit_files() -> Iterator[Path]:
    """Files with the memory limits of this process's control group and its ancestors."""
    roots = {
        "": (Path("/sys/fs/cgroup"), "memory.max"),
        "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # of version 1
    }
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, inside = line.split(":", 2)
        if controllers not in roots:
            continue
        root, name = roots[controllers]
        below = root / inside.lstrip("/")
        yield from (place / name for place in (below, *below.parents) if place.is_relative_to(root))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit, or `max`
        return None


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def device_memory() -> int | None:
    """Memory of the smallest CUDA device in bytes; None without one."""
    import torch

    count = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(count)]
    return min(sizes, default=None)
