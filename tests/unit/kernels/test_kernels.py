"""The compiled kernels: float64 formulas with their gradients, and torch without them."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_lab.config import SIZES, Size
from lowrank_lab.kernels import dispatch, library
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.memory.tracker import Tracker
from lowrank_lab.models.llama import Llama
from lowrank_lab.models.rotary import rotary_tables, rotate

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
LENGTHS = [1, 2, 5, 6, 12, 13, 48, 49, 100, 256]


def random(*shape, seed=0, size=1.0):
    chance = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=chance)).requires_grad_()


def assert_equal(ours, formula, *inputs, limit=2e-6):
    """Results and all gradients against the formula in float64, by their norms."""
    out = ours(*inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = formula(*wide)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    mine = [out, *torch.autograd.grad(out, inputs, upstream)]
    others = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    for found, expected in zip(mine, others, strict=True):
        assert found.dtype == torch.float32
        error = (found.detach() - expected.detach()).norm()
        assert error <= limit * max(1.0, expected.norm()), error / expected.norm()


def attention(q, k, v):
    """softmax(q kᵀ / √D + causal mask) v of rotated q and k, (B, T, H, D)."""
    T, D = q.shape[1], q.shape[3]
    cos, sin = (t.to(q.dtype) for t in rotary_tables(T, D))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).mT / D**0.5
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    return (scores.where(mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def ours(q, k, v):
    return kernels.rotary_attention(q, k, v, *rotary_tables(q.shape[1], q.shape[3]))


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("head_size", [16, 32, 48, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_the_formula_with_its_gradients(length, head_size, size):
    inputs = [random(2, length, 3, head_size, seed=s, size=size) for s in range(3)]
    assert_equal(ours, attention, *inputs, limit=5e-6 * max(1.0, size**2))


def test_attention_takes_any_strides_and_number_of_threads():
    x = random(3, 50, 3 * 64)
    results = []
    for count in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        q, k, v = (t.view(3, 50, 4, 16) for t in x.split(64, dim=-1))
        out = ours(q, k.transpose(0, 1).contiguous().transpose(0, 1), v)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
    q, k, v = (t.reshape(3, 50, 4, 16) for t in x.split(64, dim=-1))
    assert torch.allclose(results[0][0], attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("head_size", [16, 32, 48, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_in_bfloat16_is_the_formula_of_the_same_numbers(
    monkeypatch, length, head_size, size
):
    monkeypatch.setattr(kernels, "largest_bf16_head", lambda: 64)
    inputs = [random(2, length, 3, head_size, seed=s, size=size).bfloat16() for s in range(3)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert kernels.takes_heads(*inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ours(*inputs)
    assert [t.dtype for t in saved[:3]] == 3 * [torch.bfloat16]
    exact = attention(*wide)
    upstream = random(*out.shape, seed=9).bfloat16()
    mine = [out, *torch.autograd.grad(out, inputs, upstream)]
    others = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    for found, expected in zip(mine, others, strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() - expected).norm()
        assert error <= 4e-3 * max(1.0, size**2) * expected.norm(), error / expected.norm()


@pytest.mark.parametrize("head_size", [32, 64])
def test_attention_in_bfloat16_is_nearer_to_the_formula_than_torch_is(head_size):
    inputs = [random(2, 256, 3, head_size, seed=s).detach().bfloat16() for s in range(3)]
    exact = attention(*(t.double() for t in inputs))
    cos, sin = (t.bfloat16() for t in rotary_tables(256, head_size))
    q, k, v = (t.transpose(1, 2) for t in inputs)
    heads = rotate(q, cos, sin), rotate(k, cos, sin), v
    theirs = F.scaled_dot_product_attention(*heads, is_causal=True)
    errors = [(t.double() - exact).norm() for t in (ours(*inputs), theirs.transpose(1, 2))]
    assert errors[0] < errors[1]


def takes(size, dtype=torch.float32):
    return kernels.takes_heads(*3 * [torch.ones(1, 2, 1, size, dtype=dtype)])


def test_which_heads_are_taken():
    assert takes(16)
    assert takes(128)
    assert takes(32, torch.bfloat16)
    assert not takes(8)
    assert not takes(32, torch.float16)
    q = torch.ones(1, 2, 1, 16)
    assert not kernels.takes_heads(q, q.bfloat16(), q)
    assert not kernels.takes_heads(*3 * [q.bfloat16().to("meta")])


@pytest.mark.parametrize(
    ("products", "largest"), [("tiles", 32), ("dots", 256), ("emulation", 256), ("unknown", 32)]
)
def test_heads_in_bfloat16_are_taken_where_torch_is_slower(monkeypatch, products, largest):
    monkeypatch.setattr(kernels, "bf16_products", lambda: products)
    assert max(size for size in (32, 64, 128, 256) if takes(size, torch.bfloat16)) == largest
    assert takes(256)


def test_huge_scores_give_finite_gradients_and_NaN_stays_NaN():
    q, k, v = (random(1, 40, 2, 16, seed=s, size=1e3) for s in range(3))
    for t in torch.autograd.grad(ours(q, k, v).sum(), (q, k, v)):
        assert t.isfinite().all()
    for broken in (torch.nan, torch.inf):
        with torch.no_grad():
            bad = q.clone()
            bad[0, 7, 0, 3] = broken
            out = ours(bad, k, v)
        assert not out[0, 7, 0].isfinite().any()
        assert out[0, :7].isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 64), (700, 88)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_rms_norm_is_the_formula_with_its_gradients(shape, size):
    def formula(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x, weight = random(*shape, size=size), random(shape[-1], seed=1)
    assert_equal(lambda x, w: kernels.rms_norm(x, w, 1e-6), formula, x, weight, limit=1e-5)


@pytest.mark.parametrize("size", [0.1, 5.0, 300.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 9), (1024, 33)])
def test_swiglu_is_the_formula_with_its_gradients(shape, size):
    gate, up = random(*shape, size=size), random(*shape, seed=1)
    assert_equal(kernels.swiglu, lambda g, u: F.silu(g) * u, gate, up)


def test_swiglu_keeps_NaN_and_takes_strided_tensors():
    gate, up = random(6, 20)[:, ::2], random(10, 6, seed=1).T
    assert_equal(
        kernels.swiglu,
        lambda g, u: F.silu(g) * u,
        *(t.detach().requires_grad_() for t in (gate, up)),
    )
    assert kernels.swiglu(torch.tensor([torch.nan, 1.0]), torch.ones(2))[0].isnan()


@pytest.mark.parametrize("vocabulary", [1, 5, 8, 512, 1001])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_losses_and_slopes_are_those_of_cross_entropy(vocabulary, size):
    logits = random(37, vocabulary, size=size).detach()
    targets = torch.randint(vocabulary, (37, 1), generator=torch.Generator().manual_seed(2))
    exact = F.cross_entropy(logits.double(), targets[:, 0], reduction="none")
    found, slopes = torch.empty(37, 1), logits.clone()
    kernels.losses_(slopes, targets, found, False)
    assert torch.equal(slopes, logits)
    assert torch.allclose(found[:, 0].double(), exact, rtol=1e-6, atol=1e-6 * max(1, size))
    kernels.losses_(slopes, targets, found, True)
    assert torch.allclose(found[:, 0].double(), exact, rtol=1e-6, atol=1e-6 * max(1, size))
    expected = logits.double().softmax(1) - F.one_hot(targets[:, 0], vocabulary)
    assert torch.allclose(slopes.double(), expected, atol=1e-6)


@pytest.mark.parametrize("target", [-100, -1, 5])
def test_a_target_outside_the_vocabulary_is_refused(target):
    with pytest.raises(IndexError, match="targets: 1 are not allowed; 0 to 4"):
        kernels.losses_(torch.randn(2, 5), torch.tensor([[0], [target]]), torch.empty(2, 1), True)


def test_second_derivatives_are_refused_not_wrong():
    gate, up = random(4), random(4, seed=1)
    out = kernels.swiglu(gate, up).tanh().sum()
    (g,) = torch.autograd.grad(out, gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_only_float32_on_a_CPU_is_taken():
    x = torch.ones(3)
    assert kernels.takes(x)
    assert not kernels.takes(x, x.double())
    assert not kernels.takes(x.bfloat16())
    assert not kernels.takes(x.to("meta"))
    assert not kernels.takes(x[:0])


def gradients(model, tokens):
    model.zero_grad()
    loss = model.loss(tokens, tokens.flip(1))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("size", [SIZES["tiny"], SIZES["micro"], Size(48, 65, 3, 1, 97)])
def test_without_a_compiler_the_same_is_computed(size, monkeypatch):
    torch.manual_seed(0)
    model, tokens = Llama(size, initializer_range=0.1), torch.randint(size.vocab_size, (2, 60))
    mine = gradients(model, tokens)
    monkeypatch.setattr(kernels, "available", lambda: False)
    for a, b in zip(mine, gradients(model, tokens), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-8)


def test_checkpointed_blocks_give_the_same_gradients():
    q, k, v = (random(1, 30, 2, 16, seed=s) for s in range(3))
    plain = torch.autograd.grad(ours(q, k, v).square().sum(), (q, k, v))
    again = torch.autograd.grad(
        checkpoint(ours, q, k, v, use_reentrant=False).square().sum(), (q, k, v)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "size"), [(1, 16), (48, 32), (49, 48), (97, 64), (300, 128)])
def test_attention_stays_in_the_scratch_memory_that_is_planned(monkeypatch, length, size, dtype):
    guards = []

    def allocated(allocate, *args):
        *results, scratch = allocate(*args)
        guarded = torch.full((len(scratch) + 1000,), 7.0)
        guards.append(guarded[len(scratch) :])
        return *results, guarded

    for name in ("_allocate_attention", "_allocate_attention_gradients"):
        monkeypatch.setattr(dispatch, name, partial(allocated, getattr(dispatch, name)))
    q, k, v = (random(1, length, 2, size, seed=s).to(dtype) for s in range(3))
    torch.autograd.grad(ours(q, k, v).sum(), (q, k, v))
    assert [guard.eq(7).all().item() for guard in guards] == [True, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("CXX", "/nonexistent"), ("PATH", ""), (library.SWITCH, "0"), ("HOME", "/proc")],
)
def test_training_goes_on_without_a_compiler_or_a_cache(name, value, tmp_path):
    found = "import torch; from lowrank_lab.models.llama import Llama; from lowrank_lab.config "
    code = found + (
        "import SIZES; m = Llama(SIZES['tiny']); t = torch.ones(1, 8, dtype=torch.long); "
        "m.loss(t, t).backward(); from lowrank_lab.kernels.operators import available; "
        "print(available())"
    )
    clean = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "HOME": str(tmp_path), name: value},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(name in ("CXX", "HOME"))
    assert done.stderr.splitlines() == (
        ["kernels: CXX: /nonexistent is not found; the usual compilers are tried"]
        if name == "CXX"
        else []
    )


def test_a_tracker_sees_what_the_kernels_allocate():
    model = Llama(SIZES["micro"])
    tokens = torch.zeros(2, 64, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters())
    with Tracker(model, optimizer) as tracker:
        model.loss(tokens, tokens).backward()
    assert tracker.alive_bytes > 0
    assert kernels.python_body(torch.ops.lowrank_lab_cpu.attention.default) is not None
