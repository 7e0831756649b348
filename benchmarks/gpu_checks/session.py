"""What every section of a check has: the device, its sizes, timers, and the prepared files."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_checks.results import Results
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.training.gradients import Batch

# Spectra decompose every layer that this matches; one is enough where they aren't the subject.
ONE_LAYER = r"layers\.0\.self_attn\.q_proj$"

Item = tuple[str, Callable[[], object]]  # a name, and a function that records facts


@dataclass
class Session:
    """One check of one device.

    Attributes:
        device: where everything is computed; a CPU stands in for a card in a dry run.
        tiny: sizes at which a CPU passes all sections in less than a minute.
        results: receives the facts.
        scratch: a folder for runs, removed afterwards.
        prepared: the folder that `prepare` wrote, or None.
        corpus: token files to train on.
        known: numbers that later sections use, such as the matmul peak.
    """

    device: torch.device
    tiny: bool
    results: Results
    scratch: Path
    corpus: Corpus
    prepared: Path | None = None
    known: dict[str, float] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Release what earlier items left, and forget what was compiled."""
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch._dynamo.reset()
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any], rounds: int = 5, warm_up: int = 2) -> float:
        """Median time of a call: between two events on CUDA, by the clock on a CPU."""
        for _ in range(warm_up):
            run()
        if not self.on_cuda:
            return statistics.median(_clocked(run) for _ in range(rounds))
        pairs = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.synchronize()  # otherwise the queue hides the time of launches
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        self.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def tokens(self, vocab_size: int, shape: tuple[int, int], seed: int = 0) -> Batch:
        """Random inputs and targets on the device, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
        return drawn[:, :-1].contiguous().to(self.device), drawn[:, 1:].contiguous().to(self.device)

    def prepared_facts(self, name: str) -> Any:
        """What `prepare` computed under a name; None where it was not run."""
        path = None if self.prepared is None else self.prepared / "expected.json"
        return json.loads(path.read_text()).get(name) if path and path.exists() else None


@contextmanager
def training_on(corpus: Corpus) -> Iterator[None]:
    """In this block `train` reads these token files, whatever corpus a configuration names."""
    with patch("lowrank_lab.training.preflight.prepare", lambda config: corpus):
        yield


def _clocked(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64, wherever the two are; 0 for two zeros."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.device != theirs.device:
        ours, theirs = ours.cpu(), theirs.cpu()
    difference, size = float((ours - theirs).norm()), float(theirs.norm())
    return difference / size if size else difference
