"""What an update does between its products and fused kernels, which `--compile` makes one graph.

An optimizer step in stacks is a few products, copies, fused Adam or SGD, and between them norms per
channel and pointwise operations on vectors and buffers. A compiler changes only these. Each such
part is a function of stacks, and has a graph for every layout of stacks that it meets: those of a
run are fixed, whatever happens between its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lowrank_lab.models.compiled import CompiledGraph
from lowrank_lab.optim.channels import StackedChannels
from lowrank_lab.optim.stacks import Stacks, StackShape

MOST_GRAPHS = 8  # of one optimizer's chain; it is not compiled for further layouts
Graphs = dict["Chain", dict[Any, Callable[..., Any]]]

_graphs: Graphs | None = None


@contextmanager
def compiled_where(graphs: Graphs | None) -> Iterator[None]:
    """Compile chains of stacks that are called in this block into `graphs`; None: compile none."""
    global _graphs
    before, _graphs = _graphs, graphs
    try:
        yield
    finally:
        _graphs = before


class Chain:
    """A function of a matrix, or of stacks of many.

    It returns tensors and stacks, and may change the buffers of its stacks; a changed twin has to
    be returned. Numbers are compiled into the graph. One that changes from step to step has to be a
    0-dimensional tensor on the CPU, which no device waits for.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __call__(self, *args: Any) -> Any:
        if _graphs is None or not any(isinstance(a, Stacks) for a in args):
            return self.function(*args)
        known = _graphs.setdefault(self, {})
        layout = tuple(_layout(a) for a in args)
        if layout not in known and len(known) < MOST_GRAPHS:
            known[layout] = StackedGraph(self.function, args)
        return known[layout](*args) if layout in known else self.function(*args)


class StackedGraph:
    """The operations of a function on the tensors in its arguments, compiled.

    Stacks are walked through while it is traced: the graph has no Python of theirs.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self._shapes: list[list[StackShape] | None] = []  # of the results; None: a tensor

        def on_tensors(*tensors: Tensor) -> Any:
            found = function(*_with_tensors(args, iter(tensors)))
            results = found if isinstance(found, tuple) else (found,)
            self._single = results is not found
            self._shapes = [r.shapes if isinstance(r, Stacks) else None for r in results]
            return tuple(r.flat if isinstance(r, Stacks) else r for r in results)

        functional = torch.func.functionalize(on_tensors, remove="mutations")
        graph = make_fx(functional, tracing_mode="fake")(*_tensors(args))
        _forget_pairs_(graph)
        self._compiled = CompiledGraph(graph)

    def __call__(self, *args: Any) -> Any:
        found = self._compiled(*_tensors(args))
        results = [
            t if shapes is None else Stacks(shapes, t)
            for t, shapes in zip(found, self._shapes, strict=True)
        ]
        return results[0] if self._single else results


def _forget_pairs_(graph: torch.fx.GraphModule) -> None:
    """Write no buffer of stacks and their twin: that would copy the half that hasn't changed."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        if node.args[0].op == "placeholder" and node.args[0].meta["val"].ndim == 2:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _twins(args: Sequence[Any]) -> set[int]:
    """Which stacks are another's twin, and have no buffer of their own."""
    return {id(vars(a).get("twin")) for a in args if isinstance(a, Stacks)}


def _layout(a: Any) -> Any:
    """What a graph depends on."""
    if isinstance(a, StackedChannels):
        return (*a.parts, *a.axes)
    shapes = a.shapes if isinstance(a, Stacks) else []
    t = a.whole if isinstance(a, Stacks) else a
    return (*shapes, t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else a


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors in arguments, and the buffers of stacks."""
    twins = _twins(args)
    found = [a.whole if isinstance(a, Stacks) else a for a in args if id(a) not in twins]
    return [t for t in found if isinstance(t, Tensor)]


def _with_tensors(args: Sequence[Any], tensors: Iterator[Tensor]) -> Iterator[Any]:
    """The arguments with other tensors in them; a twin follows its stacks."""
    new: dict[int, Stacks] = {}
    for a in args:
        if isinstance(a, Stacks) and id(a) not in new:
            new[id(a)] = Stacks.around(a.shapes, next(tensors))
            if "twin" in vars(a):
                new[id(a.twin)] = new[id(a)].twin
        yield next(tensors) if isinstance(a, Tensor) else new.get(id(a), a)
