"""What a simulation or a measurement of training memory returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.memory.trace import Trace


@dataclass
class MemoryReport:
    """The memory of training, step by step of each kind.

    Attributes:
        config: of the run; None for a model of one's own.
        source: `simulated` or `measured`.
        steps: a Trace for each kind of step, by name: `first`, `next`, and those with events.
        persistent: weights, gradients and states between two steps, after the last of `steps`.
        allocated: bytes at the peak of each step according to the allocator (measured only).
        excluded: what the figures leave out, in words.
        world_size: number of processes that share the run by FSDP2; 0 without it.
        rank: of this process.
        seconds: duration of the simulation or measurement.
    """

    config: ResolvedConfig | None
    source: str
    steps: dict[str, Trace] = field(default_factory=dict)
    persistent: Breakdown = field(default_factory=Breakdown)
    allocated: dict[str, int] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    world_size: int = 0
    rank: int = 0
    seconds: float = 0.0

    @property
    def peak_step(self) -> str:
        """The kind of step with the highest peak."""
        return max(self.steps, key=lambda name: self.steps[name].peak.total)

    @property
    def peak(self) -> Breakdown:
        """The breakdown at the peak, over all kinds of steps."""
        return self.steps[self.peak_step].peak
