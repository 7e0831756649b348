"""Compiled graphs: float32 products of a CPU return their matrices, all others fill one."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lowrank_lab.kernels.graphs import ReturnedProducts
from lowrank_lab.models import compiled


def layer(x, W, V):
    return torch.relu(x @ W.T) @ V


def operands(dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, dtype=dtype, device=device) for shape in ((5, 4), (7, 4), (7, 3))]


def products_after_the_pass(dtype, device):
    with FakeTensorMode():
        made = make_fx(layer)(*operands(dtype, device))
    ReturnedProducts()(made.graph)
    return [str(node.target) for node in made.graph.nodes if "mm" in str(node.target)]


@pytest.mark.parametrize(
    ("dtype", "device", "name"),
    [(torch.float32, "cpu", "lowrank_lab_cpu.mm.default"),
     (torch.bfloat16, "cpu", "aten.mm.default"), (torch.float32, "meta", "aten.mm.default")],
)  # fmt: skip
def test_only_float32_products_of_a_cpu_are_replaced(dtype, device, name):
    assert products_after_the_pass(dtype, device) == [name, name]


@pytest.mark.parametrize("slow", [True, False])
def test_a_compiled_function_fills_no_matrix_where_oneDNN_is_faster(slow, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(compiled, "mkl_is_slow", lambda: slow)
    x, W, V = operands()
    W.requires_grad_()
    expected = torch.autograd.grad(layer(x, W, V).sum(), W)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found = torch.autograd.grad(compiled.Compiled(layer)(x, W, V).sum(), W)[0]
    torch.testing.assert_close(found, expected)
    assert ("lowrank_lab_cpu::mm" in {event.name for event in seen.events()}) is slow


def test_torch_keeps_such_graphs_in_its_cache():
    assert ReturnedProducts().uuid() == ReturnedProducts().uuid() is not None
