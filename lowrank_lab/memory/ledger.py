"""Births and deaths of storages, event by event; a `Trace` is a ledger's record of one step."""

from __future__ import annotations

import weakref

import torch

from lowrank_lab.memory.trace import Block, Trace

START = "start"  # the phase before the first named range; its births are one event


class Ledger:
    """Records which storages are alive, as blocks with a category and an owner.

    Args:
        granularity: sizes are rounded up to a multiple of so many bytes, as allocators do.
    """

    def __init__(self, granularity: int = 1) -> None:
        self._granularity = granularity
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._event = 0
        self._blocks: list[Block] = []
        self._changes: list[tuple[int, int, int]] = []
        self._phases: list[tuple[int, str]] = [(0, START)]

    @property
    def phase(self) -> str:
        """The current phase."""
        return self._phases[-1][1]

    def begin_phase(self, name: str) -> None:
        """Let events from now on belong to a phase."""
        self._event += 1
        self._phases.append((self._event, name))

    def alive(self) -> list[Block]:
        """The blocks that are alive."""
        return [self._blocks[index] for _, index in self._alive.values()]

    def block_of(self, storage: torch.UntypedStorage) -> Block | None:
        """The block of a storage, None if the storage isn't recorded."""
        found = self._alive.get(storage._cdata)
        return None if found is None else self._blocks[found[1]]

    def born(self, storage: torch.UntypedStorage, category: str, owner: str) -> Block:
        """Record a storage that isn't recorded yet."""
        key, index = storage._cdata, len(self._blocks)
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        if self.phase != START:
            self._event += 1
        block = Block(size, category, owner, self._event)
        self._blocks.append(block)
        self._changes.append((self._event, index, 1))
        self._alive[key] = (weakref.ref(storage, lambda _: self._died(key)), index)
        return block

    def released(self, storage: torch.UntypedStorage) -> None:
        """Record that a storage has given back its memory, though it still exists."""
        self._died(storage._cdata)

    def _died(self, key: int) -> None:
        found = self._alive.pop(key, None)
        if found is not None:
            self._event += 1
            self._blocks[found[1]].died = self._event
            self._changes.append((self._event, found[1], -1))

    def transient(self, size: int, category: str, owner: str) -> None:
        """Record bytes that are allocated and released within one operation."""
        first, index = self._event + 1, len(self._blocks)
        self._blocks.append(Block(size, category, owner, first, first + 1))
        self._changes += [(first, index, 1), (first + 1, index, -1)]
        self._event += 2

    def cut(self) -> Trace:
        """The events since the last cut; storages that are alive open the next trace.

        There the activations and logits of this step are temporaries.
        """
        trace = Trace(self._phases, self._blocks, self._event, self._changes)
        self._begin()
        for key, (ref, index) in list(self._alive.items()):
            old = trace.blocks[index]
            done = old.category in ("activations", "logits")
            block = Block(old.bytes, "temporaries" if done else old.category, old.owner, 0)
            self._alive[key] = (ref, len(self._blocks))
            self._changes.append((0, len(self._blocks), 1))
            self._blocks.append(block)
        return trace
