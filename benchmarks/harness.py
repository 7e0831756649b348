"""Paired timings: contestants take turns, and ratios are taken round by round.

Absolute times vary by half with the machine's load; a ratio of two measurements, one right after
the other, does not. Earlier work in a process decides how much freed memory malloc keeps, which
changes the time of a step by up to half: suites, and comparisons in which that matters, run in
fresh processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lowrank_lab.device import bf16_products
from lowrank_lab.training.provenance import cpu_name


@dataclass
class Row:
    """One comparison: `ratio` is compared with the target, whose sign says which way is better.

    ours, peer and floor are in `unit`; the floor is the cost of the arithmetic or bytes alone.
    """

    name: str
    ours: float
    peer: float | None
    floor: float | None
    unit: str
    ratio: float
    target: str  # "≥ 2.2" or "≤ 0.6"; "" for a row without a target
    peer_name: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, limit = self.target.split()
        return self.ratio >= float(limit) if sign == "≥" else self.ratio <= float(limit)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


Contestant = Callable[..., Any]


def take_turns(
    contestants: Mapping[str, Contestant],
    rounds: int,
    *,
    before: Callable[[], Any] = lambda: None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every round of each contestant; the order is reversed from round to round.

    Args:
        before: called before each timing, untimed, to provide fresh inputs.
        warm_up: rounds before those that count.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for r in range(-warm_up, rounds):
            for name in names if r % 2 else names[::-1]:
                before()
                started = time.perf_counter()
                contestants[name]()
                if r >= 0:
                    seconds[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return seconds


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def contestant_apart(build: Callable[..., Callable[..., Any]], *args: Any) -> Iterator[Contestant]:
    """The contestant build(*args), created and called in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
    process.start()
    theirs.close()

    def call(*inputs: Any) -> Any:
        ours.send(inputs)
        return ours.recv()

    try:
        yield call
    finally:
        ours.close()
        process.join()


def _serve(calls: Connection, build: Callable[..., Callable[..., Any]], args: Any) -> None:
    contestant = build(*args)
    while True:
        try:
            inputs = calls.recv()
        except EOFError:
            return
        calls.send(contestant(*inputs))


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(name: str, error: float, limit: float) -> None:
    """Refuse to time two computations with different results."""
    if not error <= limit:
        raise RuntimeError(f"{name}: ours and the peer differ by {error:.2e}; allowed is {limit:g}")


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def peak_bytes(run: Contestant) -> int:
    """Peak of allocated bytes during the run, relative to those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    running = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


# Prefixes of operations that are matrix products.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::", "onednn::")


def where_time_goes(run: Contestant, parts: Mapping[str, tuple[str, ...]]) -> str:
    """The parts of a run, by their share of self time.

    Args:
        parts: name → prefixes of its operations, or of operations that call them; the first match
            counts, and the rest is called pointwise.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it writes to stderr
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    spent: Counter[str] = Counter()
    for event in record.events() or ():
        around, names = event, []
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        found = (part for part, starts in parts.items() if any(n.startswith(starts) for n in names))
        spent[next(found, "pointwise and the rest")] += event.self_cpu_time_total
    total = max(1, spent.total())
    return ", ".join(f"{part} {100 * n / total:.0f} %" for part, n in spent.most_common())


def machine(quick: bool = False) -> dict[str, Any]:
    """The machine and the packages of the timings."""
    packages = (
        "torch",
        "galore-torch",
        "fira",
        "apollo-torch",
        "pytorch-optimizer",
        "transformers",
    )
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "lscpu": lscpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gemm_gflops": {
            str(d).removeprefix("torch."): round(gemm_rate(d, quick) / 1e9)
            for d in (torch.float32, *([torch.bfloat16] if quick or bf16_is_native() else []))
        },
        "versions": {name: version(name) for name in packages},
    }


FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
EMULATION = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def lscpu() -> dict[str, Any]:
    """Vendor, family, model, caches and flags from lscpu; and the variables that hide some."""
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        lines = ""
    found = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in lines.splitlines())}
    names = ("Vendor ID", "Model name", "CPU family", "Model", "Stepping", "L2 cache", "L3 cache")
    facts: dict[str, Any] = {name: found[name] for name in names if name in found}
    flags = found.get("Flags", "").split()
    hidden = {name: os.environ[name] for name in EMULATION if name in os.environ}
    return (
        facts
        | {"flags": [f for f in FLAGS if f in flags]}
        | ({"emulated": hidden} if hidden else {})
    )


def machine_kind(facts: Mapping[str, Any]) -> str:
    """The CPU's kind: its name, family and model, and the instructions that torch uses of it."""
    own = facts.get("lscpu", {})
    number = f", family {own['CPU family']} model {own['Model']}" if "Model" in own else ""
    hidden = ", emulated" if own.get("emulated") else ""
    return f"{facts['cpu']}{number} ({facts['capability']}{hidden})"


def bf16_is_native() -> bool:
    """Whether this CPU has instructions for bf16 products."""
    return bf16_products() in ("tiles", "dots")


def gemm_rate(dtype: torch.dtype, quick: bool = False) -> float:
    """Measured peak rate of a square matrix product, in FLOP/s."""
    size = 256 if quick else 2048  # large emulated products in bfloat16 take minutes
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = min(sum(take_turns({"mm": lambda: torch.mm(a, b, out=out)}, 1)["mm"]) for _ in range(8))
    return 2 * size**3 / best
