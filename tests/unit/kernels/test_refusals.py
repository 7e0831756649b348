"""What the kernels leave to torch: shapes, tensors and modules that they can't compute with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_lab.config import Size
from lowrank_lab.kernels import dispatch
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.models import compiled, cross_entropy
from lowrank_lab.models.block import Block
from lowrank_lab.models.cross_entropy import FusedLosses, linear_cross_entropy, token_losses
from lowrank_lab.models.llama import Llama
from lowrank_lab.models.rms_norm import RMSNorm, rms_norm
from lowrank_lab.models.rotary import rotary_tables

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
SMALL = Size(32, 48, 2, 1, 64)


def block_and_input():
    torch.manual_seed(0)
    return Block(SMALL), torch.randn(8, 50, 32)


def with_layer(half, name, rows):
    block, x = block_and_input()
    setattr(getattr(block, half), name, nn.Linear(32, rows, bias=False))
    return block(x, *rotary_tables(50, 16))


def with_tables(length, size=16):
    block, x = block_and_input()
    return block(x, *rotary_tables(length, size))


def narrow_input():
    block, x = block_and_input()
    return block(x[..., :16], *rotary_tables(50, 16))


def head(hidden, weight):
    return linear_cross_entropy(
        torch.randn(hidden), torch.randn(weight), torch.zeros(hidden[0], dtype=torch.long)
    )


MISFITS = {
    "an input too narrow": narrow_input,
    "up of other rows": lambda: with_layer("mlp", "up_proj", 16),
    "k of other rows": lambda: with_layer("self_attn", "k_proj", 16),
    "few angles": lambda: with_tables(10),
    "many angles": lambda: with_tables(60),
    "angles of larger heads": lambda: with_tables(50, 32),
    "a wide head": lambda: head((400, 32), (48, 16)),
    "a narrow head": lambda: head((400, 16), (48, 32)),
    "a narrow norm": lambda: RMSNorm(16)(torch.randn(4, 32)),
    "gates without ups": lambda: Block(SMALL).mlp.gated(torch.ones(4, 16), torch.ones(3, 16)),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_shapes_that_do_not_fit_are_torchs_errors(misfit):
    with pytest.raises(RuntimeError, match=r"must match|cannot be multiplied|invalid for input"):
        misfit()


def test_shapes_that_torch_expands_are_computed_by_torch():
    gate, up = torch.randn(4, 16), torch.randn(16)
    assert torch.allclose(Block(SMALL).mlp.gated(gate, up), F.silu(gate) * up)
    x = torch.randn(4, 32)
    assert torch.allclose(rms_norm(x, torch.full((1,), 2.0)), 2 * F.rms_norm(x, (32,), eps=1e-6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_angles_of_another_dtype_are_converted(dtype):
    block, x = block_and_input()
    cos, sin = (t.to(dtype) for t in rotary_tables(50, 16))
    assert torch.equal(block(x, cos, sin), block(x, cos.float(), sin.float()))


def test_tensors_of_other_kinds_are_left_to_torch():
    class Other(torch.Tensor):
        pass

    x = torch.eye(16)
    assert kernels.takes(x)
    assert not kernels.takes(x.as_subclass(Other))
    assert not kernels.takes(x, x.to_sparse_csr())
    q = torch.ones(1, 4, 2, 16)
    assert kernels.takes_heads(q, q, q, *rotary_tables(4, 16))
    assert not kernels.takes_heads(q, q[:, :3], q[:, :3])
    assert not kernels.takes_heads(q, q, q, *rotary_tables(5, 16))


@pytest.mark.parametrize("name", ["input_layernorm", "mlp.down_proj", "mlp"])
def test_a_forward_of_its_own_is_called(name):
    block, x = block_and_input()
    module, calls = block.get_submodule(name), []
    usual = module.forward
    module.forward = lambda *args: calls.append(name) or usual(*args)
    expected = block(x, *rotary_tables(50, 16))
    assert calls == [name]
    del module.forward
    assert torch.allclose(block(x, *rotary_tables(50, 16)), expected, atol=1e-6)


def test_hooks_on_all_modules_see_all_layers():
    block, x = block_and_input()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(x, *rotary_tables(50, 16))
    finally:
        handle.remove()
    leaves = [m for m in block.modules() if not list(m.children())]
    assert all(any(m is s for s in seen) for m in leaves)


def test_an_mlp_whose_gate_has_the_activation_gets_no_other():
    block, x = block_and_input()
    block.mlp.activates = False
    angles = rotary_tables(50, 16)
    apart = torch.cat([block(x[:4], *angles), block(x[4:], *angles)])  # too few for the kernel
    assert torch.allclose(block(x, *angles), apart, atol=1e-6)


def test_a_compiled_model_has_few_graphs_for_many_lengths(monkeypatch):
    graphs = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _: graphs.append(graph) or graph)
    torch._dynamo.reset()
    model = Llama(SMALL)
    model.compile_blocks()
    for length in range(60, 75):
        model.loss(*2 * [torch.zeros(8, length, dtype=torch.long)])
    assert 0 < len(graphs) < 8


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_large_logits_leave_the_digits_of_a_small_loss(size, own, how, monkeypatch):
    if not own:
        monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    losses_ = FusedLosses() if how == "compiled" else cross_entropy._losses_
    rows = size - torch.tensor([[0.0, 5.0, 9.0]]).expand(2, 3)
    exact = F.cross_entropy(rows.double(), torch.zeros(2, dtype=torch.long))
    for slopes in (False, True):
        losses = torch.empty(2, 1)
        losses_(rows.clone(), torch.zeros(2, 1, dtype=torch.long), losses, slopes)
        assert losses[0].item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["norm", "loss"])
def test_second_derivatives_are_refused_not_wrong(name, own, monkeypatch):
    if not own:
        monkeypatch.setattr(kernels, "available", lambda: False)
    x, weight = torch.randn(4, 16).requires_grad_(), torch.randn(8, 16)
    targets = torch.zeros(4, dtype=torch.long)
    out = rms_norm(x, weight[0]) if name == "norm" else linear_cross_entropy(x, weight, targets)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_tokens_have_no_mean_loss():
    hidden, weight, targets = torch.randn(0, 16), torch.randn(8, 16), torch.zeros(0).long()
    with pytest.raises(ValueError, match="hidden: no tokens are not allowed; at least one"):
        linear_cross_entropy(hidden, weight, targets)
    assert token_losses(hidden, weight, targets).shape == (0,)


def test_losses_with_gaps_are_refused():
    targets, losses = torch.zeros(3, 1, dtype=torch.long), torch.empty(3, 1)
    with pytest.raises(ValueError, match=r"losses_: gaps .* are not allowed; contiguous ones"):
        kernels.losses_(torch.randn(5, 3).T, targets, losses, False)


def test_scratch_memory_does_not_grow_with_threads_that_have_no_work():
    sizes = {
        "attention_forward": (2, 64, 16, False), "attention_backward": (2, 64, 16, True),
        "mlp": (384, 64, 64, False), "head": (384, 64, 64, True),
        "self_attention": (8, 64, 2, 16, True),
    }  # fmt: skip
    before, found = torch.get_num_threads(), []
    for count in (16, 64):
        torch.set_num_threads(count)
        found.append([dispatch.scratch_of(name, *given) for name, given in sizes.items()])
    torch.set_num_threads(before)
    assert found[0] == found[1]
