"""Kernels that inductor makes of a graph for CUDA, counted without a card and without Triton.

The graph goes through inductor's decompositions, its passes and its lowering, on tensors without
values. Its scheduler then fuses the operations, by the rules of the Triton backend: what is left
are the kernels. No code is generated. As the tensors are on no card, large reductions are not split
in two, and pieces of a concatenation are a kernel each, which on CUDA may share one.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_lab.optim import chains

GRAPH = "graph"  # the name under which their kernels are counted


def graph_kernels(graph: torch.fx.GraphModule, tensors: tuple[Tensor, ...]) -> int:
    """Kernels of a graph of operations on these tensors, which are fake."""
    mode = detect_fake_mode(tensors)
    functional = torch.func.functionalize(graph)
    with torch.no_grad(), config.patch(cpu_backend="triton"), mode, V.set_fake_mode(mode):
        lowered = make_fx(functional, decomposition_table=select_decomp_table())(*tensors)
        _recursive_post_grad_passes(lowered, is_inference=True)
        lowering = GraphLowering(lowered, example_inputs=tensors)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*tensors)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
        nodes = lowering.scheduler.nodes
    return sum(not isinstance(node, scheduler.NopKernelSchedulerNode) for node in nodes)


def counted_graphs() -> Any:
    """A block in which graphs of optimizers are counted, and run uncompiled."""
    return patch.object(chains, "CompiledGraph", _CountedGraph)


class _CountedGraph:
    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._graph, self._kernels = graph, 0

    def __call__(self, *tensors: Tensor) -> Any:
        count = _innermost_count()
        with _disable_current_modes(), detect_fake_mode(tensors):
            found = self._graph(*tensors)
            self._kernels = self._kernels or graph_kernels(self._graph, tensors)
        if count is not None:
            count.kernels[GRAPH] += self._kernels
        return found


def _innermost_count() -> Any:
    """The `KernelCount` of the surrounding block."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if hasattr(mode, "kernels")), None)
