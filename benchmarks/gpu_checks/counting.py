"""Kernels and waits of training steps: from a profile on CUDA, by dispatched operators on a CPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_checks.session import Session
from benchmarks.kernels import KernelCount

COUNTED = "gpu check"  # the range around the counted steps
RANGES = ("loss", "optimizer")  # of a step, whose kernels are counted separately
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of calls on the host
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
SCALAR_READS = ("_local_scalar_dense", "item")
Span = tuple[float, float]  # microseconds


@contextmanager
def counted(session: Session) -> Iterator[Counter[str]]:
    """Counts of this block: `kernels`, `syncs`, `copies to host`, and kernels by range.

    Raises:
        RuntimeError: the profiler recorded no kernels.
    """
    counts: Counter[str] = Counter()
    if not session.on_cuda:
        with _Dispatched(counts):
            yield counts
        return
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as record:
        with record_function(COUNTED):
            yield counts
        session.synchronize()
    path = session.scratch / "trace.json"
    record.export_chrome_trace(str(path))
    counts.update(counts_of(path))
    path.unlink()
    if not counts["kernels"]:
        raise RuntimeError("the profiler recorded no kernels; is CUPTI there, and free?")


def counts_of(path: Path) -> Counter[str]:
    """The counts within the range COUNTED of a trace in Chrome's format.

    Kernels run later than they are launched: they belong to the range of their launch, which has
    the same correlation id.
    """
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    whole = _spans(events, COUNTED)
    parts = {name: _spans(events, name) for name in RANGES}
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})
    }
    counts: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in LAUNCHES:
            counts["syncs"] += event["name"] in WAITS and _within(event["ts"], whole)
            continue
        at = launched.get(event.get("args", {}).get("correlation"))
        if at is None or not _within(at, whole):
            continue
        if event.get("cat") == "gpu_memcpy":
            counts["copies to host"] += "DtoH" in event["name"]
        elif event.get("cat") == "kernel":
            counts["kernels"] += 1
            for name, spans in parts.items():
                counts[f"{name} kernels"] += _within(at, spans)
    return counts


def _spans(events: list[dict[str, Any]], name: str) -> list[Span]:
    """When a range was open on the host."""
    return [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] == name
    ]


def _within(at: float, spans: list[Span]) -> bool:
    return any(begin <= at <= end for begin, end in spans)


class _Dispatched(KernelCount):
    """Counts dispatched operators in the open ranges of `record_function`."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts, self._open = counts, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "profiler":
            self._open.append(str(args[0])) if "enter" in name else self._open.pop()
        before = self.total
        out = super().__torch_dispatch__(func, types, args, kwargs)
        launched = self.total - before
        self._counts["kernels"] += launched
        self._counts["syncs"] += name in SCALAR_READS
        for part in RANGES:
            self._counts[f"{part} kernels"] += launched * (part in self._open)
        return out
