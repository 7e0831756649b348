"""The memory of one step as a timeline: `Block` and `Trace`, which `tracker.Tracker` returns."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_lab.memory.breakdown import CATEGORIES, NAMES, PARTS, Breakdown

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Block:
    """One storage: its size, its category, its owner, and the events of its birth and death.

    Attributes:
        owner: the module whose forward pass made it, the parameter that it belongs to, or the phase
            in which it was made.
    """

    bytes: int
    category: str
    owner: str
    born: int
    died: int | None = None


@dataclass
class Trace:
    """The memory of one step, event by event: each event is an allocation or a release."""

    phases: list[tuple[int, str]]  # (first event, name), in order
    blocks: list[Block]
    events: int
    changes: list[tuple[int, int, int]] = field(repr=False)  # (event, block, +1 or −1)

    def timeline(self) -> dict[str, np.ndarray[Any, Any]]:
        """Bytes per category and part, at the start and after each event."""
        return self._timeline

    @cached_property
    def _timeline(self) -> dict[str, np.ndarray[Any, Any]]:
        found = {name: np.zeros(self.events + 1, dtype=np.int64) for name in NAMES}
        for event, index, sign in self.changes:
            block = self.blocks[index]
            found[block.category][event] += sign * block.bytes
            if block.category in PARTS:
                found[PARTS[block.category]][event] += sign * block.bytes
        return {name: values.cumsum() for name, values in found.items()}

    def table(self, points: int = 1000) -> pd.DataFrame:
        """The timeline with columns event, phase and bytes per category, thinned to about `points`
        rows.

        Of neighbouring events the one with the most bytes stays, so that no peak is lost.
        """
        import pandas as pd

        table = pd.DataFrame(self._timeline)
        table.insert(0, "event", np.arange(self.events + 1))
        bins = table["event"] // max(1, len(table) // points)
        kept = table.loc[pd.Series(self.total()).groupby(bins).idxmax()].reset_index(drop=True)
        kept.insert(1, "phase", [self.phase_of(event) for event in kept["event"]])
        return kept

    def total(self) -> np.ndarray[Any, Any]:
        """All bytes after each event."""
        total: np.ndarray[Any, Any] = np.sum([self._timeline[n] for n in CATEGORIES], axis=0)
        return total

    @property
    def peak_event(self) -> int:
        """The event after which most bytes are alive."""
        return int(self.total().argmax())

    @property
    def peak(self) -> Breakdown:
        """Bytes per category at the peak."""
        return self.at(self.peak_event)

    @property
    def kept(self) -> Breakdown:
        """Bytes per category at the start of the backward pass."""
        return self.at(next((event for event, name in self.phases if name == "backward"), 0))

    def at(self, event: int) -> Breakdown:
        """Bytes per category after an event."""
        return Breakdown(**{name: int(v[event]) for name, v in self.timeline().items()})

    def phase_of(self, event: int) -> str:
        """The phase in which an event happened."""
        return next((name for first, name in reversed(self.phases) if first <= event), "")

    def alive(self, event: int | None = None) -> list[Block]:
        """The blocks that are alive after an event (by default at the peak), largest first."""
        when = self.peak_event if event is None else event
        there = [b for b in self.blocks if b.born <= when and (b.died is None or b.died > when)]
        return sorted(there, key=lambda block: -block.bytes)

    def by_owner(self, event: int | None = None) -> dict[tuple[str, str], int]:
        """Bytes per (category, owner) after an event (by default at the peak), largest first."""
        found: dict[tuple[str, str], int] = defaultdict(int)
        for block in self.alive(event):
            found[block.category, block.owner] += block.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))
