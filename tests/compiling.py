"""For tests of compiled code: graphs are counted, and a recompilation is an error."""

from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters

from lowrank_lab.kernels import operators
from lowrank_lab.models import compiled


@contextmanager
def counting(monkeypatch, backend):
    """Compile with a cheap backend of torch in this block; counters are zero when it begins."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(operators, "available", lambda: False)  # kernels of a CPU replace graphs
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()
