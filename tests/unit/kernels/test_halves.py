"""Halves of a block, and the head with its loss, in one kernel each: the formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_lab.config import SIZES, Size
from lowrank_lab.kernels import dispatch, halves, head
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.layers.replace import factorize
from lowrank_lab.memory.modules import ModuleStack
from lowrank_lab.models import fused
from lowrank_lab.models.block import Block
from lowrank_lab.models.cross_entropy import linear_cross_entropy
from lowrank_lab.models.llama import Llama
from lowrank_lab.models.rotary import rotary_tables

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
SMALL = Size(32, 48, 2, 1, 64)
OPERATORS = ("self_attention", "mlp")


def block_of(size, seed=0):
    torch.manual_seed(seed)
    block = Block(size)
    for p in block.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return block


def run(block, x):
    """The block's result, and the gradients of all parameters and of x."""
    size = block.self_attn.head_size
    cos, sin = (t.to(x.dtype) for t in rotary_tables(x.shape[1], size))
    out = block(x, cos, sin)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def calls_of(function):
    """The kernels of halves that a function calls, in order."""
    with torch.profiler.profile() as record:
        function()
    names = [event.name.partition("::")[2] for event in record.events()]
    return tuple(name for name in names if name in OPERATORS)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3))


@pytest.mark.parametrize("shape", [(384, 1), (8, 48), (9, 50), (70, 6), (11, 97)])
@pytest.mark.parametrize("size", [SMALL, Size(96, 16, 2, 1, 64), Size(64, 176, 4, 1, 64)])
def test_a_block_is_the_formula_with_its_gradients(size, shape):
    block, x = block_of(size), torch.randn(*shape, size.hidden_size).requires_grad_()
    wide = copy.deepcopy(block).double()
    expected = run(wide, x.detach().double().requires_grad_())
    assert calls_of(lambda: run(block, x)) == OPERATORS
    for found, exact in zip(run(block, x), expected, strict=True):
        assert found.dtype == torch.float32
        assert error(found, exact) < 5e-6


def test_an_input_with_any_strides_and_a_gradient_that_is_expanded():
    block = block_of(SMALL)
    x = torch.randn(50, 9, 32).transpose(0, 1).requires_grad_()
    expected = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    assert all(error(a, b) < 5e-6 for a, b in zip(run(block, x), expected, strict=True))
    block(x, *rotary_tables(50, 16)).sum().backward()
    assert x.grad.isfinite().all()


def test_the_same_bits_on_any_number_of_threads():
    block, x = block_of(SMALL), torch.randn(9, 51, 32).requires_grad_()
    hidden, weight = torch.randn(433, 32).requires_grad_(), torch.randn(48, 32).requires_grad_()
    targets = torch.arange(433) % 48
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 5, 11):
        torch.set_num_threads(count)
        loss = linear_cross_entropy(hidden, weight, targets)
        results.append([*run(block, x), loss, *torch.autograd.grad(loss, [hidden, weight])])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_frozen_weights_get_no_gradient_and_change_no_other():
    block, x = block_of(SMALL), torch.randn(8, 50, 32).requires_grad_()
    expected = run(block, x)
    frozen = [block.self_attn.q_proj.weight, block.mlp.down_proj.weight]
    names = [i for i, p in enumerate(block.parameters()) if not any(p is f for f in frozen)]
    for p in frozen:
        p.requires_grad_(False)
    kept = [expected[0], expected[1], *(expected[2 + i] for i in names)]
    assert all(torch.equal(a, b) for a, b in zip(run(block, x), kept, strict=True))


def test_one_NaN_stays_in_its_sequence():
    block, x = block_of(SMALL), torch.randn(8, 50, 32)
    x[3, 2, 7] = torch.nan
    out = block(x, *rotary_tables(50, 16))
    assert out[3, 2:].isnan().all()
    assert out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def with_bias(block):
    block.mlp.up_proj = nn.Linear(32, 48)
    block.self_attn.o_proj = nn.Linear(32, 32)


def with_other_layers(block):
    factorize(block, kind="low-rank", rank=4, target=".*(up|q)_proj")


def with_hooks(block):
    for layer in (block.mlp.gate_proj, block.self_attn.v_proj):
        layer.register_forward_hook(lambda *_: None)


def with_hooks_on_norms(block):
    for layer in (block.input_layernorm, block.post_attention_layernorm):
        layer.register_full_backward_hook(lambda *_: None)


def with_hooks_on_halves(block):
    for half in (block.self_attn, block.mlp):
        half.register_forward_pre_hook(lambda module, inputs: None)


def with_own_modules(block):
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block.mlp.down_proj, block.self_attn.k_proj = Own(48, 32, bias=False), Own(32, 32, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        with_bias,
        with_other_layers,
        with_hooks,
        with_hooks_on_norms,
        with_hooks_on_halves,
        with_own_modules,
    ],
)
def test_layers_that_are_not_plain_are_called_themselves(change):
    block = block_of(SMALL)
    change(block)
    x = torch.randn(8, 50, 32).requires_grad_()
    assert calls_of(lambda: run(block, x)) == ()
    expected = run(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    assert all(error(a, b) < 5e-6 for a, b in zip(run(block, x), expected, strict=True))


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        (SMALL, (7, 90), ()),  # too few sequences for threads
        (SMALL, (8, 47), ()),  # too few rows
        (SIZES["tiny"], (8, 50), ("self_attention",)),  # 88 columns: no multiple of 16
        (Size(32, 48, 4, 1, 64), (8, 50), ("mlp",)),  # heads of 8
    ],
)
def test_other_shapes_are_computed_layer_by_layer(size, shape, expected):
    block, x = block_of(size), torch.randn(*shape, size.hidden_size).requires_grad_()
    assert calls_of(lambda: run(block, x)) == expected


def test_large_weights_are_multiplied_layer_by_layer(monkeypatch):
    block, x = block_of(SMALL), torch.randn(8, 50, 32).requires_grad_()
    weights = sum(p.numel() for p in block.mlp.parameters()) + 32  # those of the norm
    for most, expected in ((weights, OPERATORS), (weights - 1, ("self_attention",))):
        monkeypatch.setattr(fused, "MOST_WEIGHTS", most)
        assert calls_of(lambda: run(block, x)) == expected


def test_autocast_is_not_bypassed():
    block, x = block_of(SMALL), torch.randn(8, 50, 32)
    given = x, block.post_attention_layernorm, block.mlp, block.mlp.layers()
    assert fused.fused_weights(*given) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.fused_weights(*given) is None


def test_a_tracker_of_memory_sees_the_kernels_that_training_uses():
    model = Llama(SMALL)
    tokens = torch.zeros(8, 50, dtype=torch.long)
    stack = ModuleStack(model, lambda blocks: None)
    assert calls_of(lambda: model.loss(tokens, tokens).backward()) == OPERATORS
    for handle in stack.handles:
        handle.remove()


def test_a_compiled_model_uses_them_as_well():
    torch.manual_seed(0)
    model, tokens = Llama(SMALL, initializer_range=0.1), torch.randint(64, (8, 50))
    expected = model.loss(tokens, tokens)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    model.compile_blocks()
    found = model.loss(tokens, tokens)
    assert torch.allclose(found, expected)
    mine = torch.autograd.grad(found, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, grads, strict=True))
    assert calls_of(lambda: model.loss(tokens, tokens)) == OPERATORS


def test_tensors_of_another_class_keep_their_own_products():
    class Other(torch.Tensor):
        pass

    hidden, weight = torch.randn(400, 16), torch.randn(16, 16)
    assert head.takes_head(hidden, weight)
    assert not head.takes_head(hidden, weight.as_subclass(Other))
    assert not kernels.are_plain(hidden, weight.as_subclass(Other))


@pytest.mark.parametrize("batch", [8, 4])
def test_torch_counts_the_flops_of_the_kernels(batch):
    model, tokens = Llama(SMALL), torch.zeros(batch, 54, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    attention = 6 * 54 * 32 * tokens.numel()
    products = 6 * (4 * 32 * 32 + 3 * 32 * 48 + 64 * 32)
    assert counter.get_total_flops() == products * tokens.numel() + attention


@pytest.fixture
def guards(monkeypatch):
    """What lies behind the scratch memory of each call: whether the kernel has left it alone."""
    found, planned = [], {}

    def more(name, *sizes):
        planned[name] = dispatch.scratch_of(name, *sizes) + 1000
        return planned[name]

    def guarded(name, *args):
        scratch = next(a for a in args if torch.is_tensor(a) and a.numel() in planned.values())
        scratch[-1000:] = 7
        result = dispatch.call(name, *args)
        found.append(bool((scratch[-1000:] == 7).all()))
        return result

    for module in (halves, head, kernels):
        monkeypatch.setattr(module, "scratch_of", more)
        monkeypatch.setattr(module, "call", guarded)
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [SMALL, Size(16, 176, 1, 1, 64), Size(112, 48, 7, 1, 64)])
def test_the_kernels_stay_in_the_scratch_memory_that_is_planned(guards, size, threads):
    before, d = torch.get_num_threads(), size.hidden_size
    torch.set_num_threads(threads)
    run(block_of(size), torch.randn(9, 61, d).requires_grad_())
    hidden, weight = torch.randn(400, d).requires_grad_(), torch.randn(48, d)
    linear_cross_entropy(hidden.detach(), weight, torch.zeros(400, dtype=torch.long))
    linear_cross_entropy(hidden, weight, torch.zeros(400, dtype=torch.long))
    for m, k, n in ((7, 300, 41), (300, 1, 2100), (97, 513, 16)):
        for a in (torch.randn(m, k), torch.randn(k, m).T):
            found = kernels.product(a, torch.randn(k, n), torch.empty(m, n))
            assert found.isfinite().all()
    torch.set_num_threads(before)
    assert guards == 12 * [True]


@pytest.mark.parametrize(("count", "d", "V"), [(384, 16, 16), (431, 32, 48), (500, 64, 112)])
def test_losses_of_a_head_are_the_formula_with_their_gradients(count, d, V):
    torch.manual_seed(0)
    hidden = torch.randn(count, d).requires_grad_()
    weight = torch.randn(V, d).requires_grad_()
    targets = torch.randint(V, (count,))
    assert head.takes_head(hidden, weight)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets)
    expected = [exact.detach(), *torch.autograd.grad(exact, wide)]
    loss = linear_cross_entropy(hidden, weight, targets)
    found = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    assert all(error(a, b) < 5e-6 for a, b in zip(found, expected, strict=True))
    for only in (hidden, weight):
        alone = [t if t is only else t.detach() for t in (hidden, weight)]
        (grad,) = torch.autograd.grad(linear_cross_entropy(*alone, targets), only)
        assert torch.equal(grad, found[1 if only is hidden else 2])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), loss)


@pytest.mark.parametrize(
    ("targets", "kind"),
    [([0, 16], IndexError), ([0, -100], IndexError), ([0], ValueError)],
)
def test_a_head_refuses_targets_that_are_no_tokens(targets, kind):
    with pytest.raises(kind, match=r"; 400 whole numbers|targets: 1 are not allowed; 0 to 15"):
        linear_cross_entropy(
            torch.randn(400, 16), torch.randn(16, 16), torch.tensor([*targets, *398 * [1]])
        )
