"""Chains of operations on vectors, each of which `--compile` turns into one kernel.

An optimizer step in stacks is a few products, fused Adam, norms per channel, and chains of small
operations on vectors with an entry for each channel, parameter or gradient entry. A compiler
changes only the chains. They are pure functions of vectors of any length: one graph serves all
stacks and all steps, whatever happens between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lowrank_lab.models.compiled import Compiled

_compiled = False


@contextmanager
def compiled_where(on: bool) -> Iterator[None]:
    """Chains called in this block are compiled, if `on`."""
    global _compiled
    before, _compiled = _compiled, on
    try:
        yield
    finally:
        _compiled = before


class Chain:
    """A pure pointwise function of vectors and numbers.

    Numbers are compiled into the graph. One that changes from step to step has to be a
    0-dimensional tensor on the CPU, which no device waits for.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.__doc__ = function, function.__doc__
        self._graph: Compiled | None = None

    def __call__(self, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        vectors = tensors[0].ndim == 1 and len(tensors[0]) > 1
        if not (_compiled and vectors):  # single tensors have other shapes: another graph for each
            return self._function(*args)
        if self._graph is None:
            self._graph = Compiled(self._function, dynamic=True)
        return self._graph(*args)
