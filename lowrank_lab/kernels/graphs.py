"""A pass over compiled graphs: float32 products on a CPU allocate their results.

torch.compile passes each product its output, into which oneDNN's result would have to be copied:
4 % of a training step at 5 M parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from lowrank_lab.kernels.dispatch import NAMESPACE


class ReturnedProducts(CustomGraphPass):
    """Replace `aten.mm` by an operator that allocates its result."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        own: Any = getattr(torch.ops, NAMESPACE).mm.default
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            made = node.meta["val"]
            if made.device.type == "cpu" and made.dtype is torch.float32:
                node.target = own

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
