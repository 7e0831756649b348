"""Measured memory of each method against its simulation: states to the byte, peaks within 3 %."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.session import Item, Session
from lowrank_lab import METHODS, RunConfig
from lowrank_lab.memory.formulas import optimizer_state_bytes
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.memory_report import MemoryReport
from lowrank_lab.planning.simulate import measure, simulate

SHARE = 0.03
WORKSPACE = 64 << 20  # bytes: cuBLAS's and cuSOLVER's, which the allocator hands out as well
IN_DRY_RUN = ("full-rank", "low-rank", "galore")
SLOW = "adamw-8bit"  # its step compiles itself


def items(session: Session) -> Iterator[Item]:
    names = [name for name in METHODS if not session.tiny or name in IN_DRY_RUN]
    for name in sorted(names, key=SLOW.__eq__):
        yield name, partial(as_simulated, session, name)


def configuration(method: str, tiny: bool) -> RunConfig:
    if tiny:
        return RunConfig(model="tiny", method=method, batch=16, sequence_length=64, steps=100)
    # Few tokens, so that weights and states are a large part of the peak.
    return RunConfig(
        model="60m", method=method, batch=8, sequence_length=256, precision="bf16", steps=1000,
        vocab_size=32_000,
    )  # fmt: skip


def expected(report: MemoryReport) -> dict[str, Any]:
    """The figures of a simulation that a measurement is compared with; `prepare` keeps them."""
    peaks = {kind: trace.peak.total for kind, trace in report.steps.items()}
    bytes_ = report.persistent
    return {"weights": bytes_.weights, "states": bytes_.optimizer_states, "peaks": peaks}


def simulated(method: str, device: str, tiny: bool = False) -> dict[str, Any]:
    return expected(simulate(configuration(method, tiny), device))


def as_simulated(session: Session, method: str) -> None:
    """Weights and states to the byte; the highest peak of all kinds of steps."""
    prepared = session.prepared_facts("memory") or {}
    wanted = prepared.get(method) if not session.tiny else None
    wanted = wanted or simulated(method, session.device.type, session.tiny)
    warm_up(session)
    config = configuration(method, session.tiny)
    found = measure(config, session.device.type)
    report = session.results.fact
    states = found.persistent.optimizer_states
    report(f"{method}: weights, |measured − simulated|",
           abs(found.persistent.weights - wanted["weights"]), "bytes", at_most(0))  # fmt: skip
    for who, size in (("simulated", wanted["states"]), ("formula", optimizer_state_bytes(
        resolve(config)))):  # fmt: skip
        report(f"{method}: states, |measured − {who}|", abs(states - size), "bytes", at_most(0),
               measured=states)  # fmt: skip
    peak, most = max(found.allocated.values()), max(wanted["peaks"].values())
    allowed = SHARE * most + (WORKSPACE if session.on_cuda else 0)
    report(
        f"{method}: peak, |measured − simulated|", abs(peak - most) / 2**20, "MiB",
        at_most(allowed / 2**20), peak_mib=peak / 2**20, simulated_mib=most / 2**20,
        kinds={kind: [size, wanted["peaks"].get(kind)] for kind, size in found.allocated.items()},
    )  # fmt: skip


def warm_up(session: Session) -> None:
    """Products of each dtype in both passes: each of torch's threads has a workspace of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, device=session.device, dtype=dtype, requires_grad=True)
        torch.addmm(a, a, a).sum().backward()
    session.synchronize()
