"""The card: its facts, its copy bandwidth, and the matmul peak that utilisation refers to."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.backends import cudnn

from benchmarks.gpu_checks.session import Item, Session
from lowrank_lab.training.provenance import cpu_name

COPIED = 1 << 31  # bytes, many times a cache
SIDE = 8192


def items(session: Session) -> Iterator[Item]:
    yield "facts", partial(facts, session)
    yield "copy bandwidth", partial(copy_bandwidth, session)
    yield "matrix product", partial(matmul_peak, session)


def facts(session: Session) -> None:
    """Names and versions; on a CPU those of the CPU."""
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not session.on_cuda:
        session.results.fact("card", cpu_name(), threads=torch.get_num_threads(), **versions)
        return
    found = torch.cuda.get_device_properties(session.device)
    session.results.fact(
        "card", found.name,
        bytes=found.total_memory, multiprocessors=found.multi_processor_count,
        capability=f"{found.major}.{found.minor}", cudnn=cudnn.version(),
        host_cpu=cpu_name(), **versions,
    )  # fmt: skip


def copy_bandwidth(session: Session) -> None:
    """Bytes read and written per second by a copy within the device."""
    size = COPIED // (256 if session.tiny else 1)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    taken = session.seconds(lambda: target.copy_(source))
    session.results.fact("copy, bytes read and written", 2 * size / taken / 1e9, "GB/s")


def matmul_peak(session: Session) -> None:
    """FLOP/s of a square bf16 product of random matrices."""
    side = 256 if session.tiny else SIDE
    a, b = (torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    taken = session.seconds(lambda: torch.mm(a, b, out=out), rounds=10, warm_up=3)
    session.known["matmul_flops"] = rate = 2 * side**3 / taken
    session.results.fact(f"{side}³ product in bf16", rate / 1e12, "TFLOP/s")
