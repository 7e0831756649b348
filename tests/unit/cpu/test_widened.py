"""Bfloat16 products in float32, where a CPU would emulate them: the same numbers, rounded once."""

import pytest
import torch
import torch.nn.functional as F

import lowrank_lab as lab
from lowrank_lab import device
from lowrank_lab.cpu import products, widened

SHAPES = [(64, 48, 80), (1, 300, 200), (300, 200, 1), (200, 1, 300), (9000, 200, 130)]


@pytest.fixture
def calls(monkeypatch):
    """A processor that emulates bfloat16, and the shapes of what is widened."""
    found = []

    def recorded(out, a, b, *others, multiply_=widened.multiply_):
        found.append((tuple(a.shape), tuple(b.shape)))
        return multiply_(out, a, b, *others)

    for module in (widened, products):
        monkeypatch.setattr(module, "bf16_products", lambda: "emulation")
    monkeypatch.setattr(widened, "multiply_", recorded)
    monkeypatch.setattr(widened, "PIECE", 2**13)  # several pieces of rows and columns
    monkeypatch.setattr(widened, "SMALLEST", 2**12)
    return found


def random(rows, columns, transposed=False):
    t = torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)
    return t.bfloat16()


def assert_rounded_once(found, exact, scale):
    """Half a unit in the last of eight bits, and float32's rounding of the sum."""
    assert found.dtype == torch.bfloat16
    limit = 2.0**-8 * exact.abs() + 1e-5 * scale
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products_are_those_of_float64_rounded_once(calls, m, k, n, transposed):
    a, b, base = random(m, k, transposed[0]), random(k, n, transposed[1]), random(m, n)
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs() + 1
    with lab.fast_products():
        assert_rounded_once(a @ b, exact, scale)
        out = base.clone()
        torch.mm(a, b, out=out)
        assert_rounded_once(out, exact, scale)
        found = torch.addmm(base, a, b, beta=2, alpha=-0.5)
        assert_rounded_once(found, 2 * base.double() - exact / 2, scale)
        assert_rounded_once(torch.addmm(base[:1], a, b), base[:1].double() + exact, scale)
        into = base.clone()
        assert into.addmm_(a, b, alpha=3) is into
        assert_rounded_once(into, base.double() + 3 * exact, 3 * scale)
        nothing = torch.addmm(base.new_full((1,), torch.nan), a, b, beta=0)
        assert_rounded_once(nothing, exact, scale)
    assert len(calls) == 6


def test_what_autocast_makes_of_a_layer_and_its_gradients_is_what_torch_makes(calls):
    x, W = torch.randn(8, 64, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True)
    bias = torch.randn(80, requires_grad=True)

    def derivatives():
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(F.linear(x, W, bias), W.T)
            with torch.no_grad():
                z = torch.mm(y[0], y[0].T.clone(), out=y.new_empty(64, 64))
        return y, z, *torch.autograd.grad(y.float().square().mean(), (x, W, bias))

    usual = derivatives()
    assert not calls
    with lab.fast_products():
        found = derivatives()
    assert len(calls) == 7
    for a, b in zip(usual, found, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-2 * a.norm()


def test_the_rest_is_computed_as_usual(calls):
    a, square = random(64, 64), random(96, 96)
    with lab.fast_products():
        assert torch.equal(
            a[:8, :8] @ a[:8, :8], (a[:8, :8].float() @ a[:8, :8].float()).bfloat16()
        )
        assert (a[:0] @ a).shape == (0, 64)
        a.float() @ a.float()
        a.half() @ a.half()
        torch.bmm(a[None], a[None])
        square[:, :64].addmm_(square[:, :64].clone(), a)
        calls.clear()
        square[:64, :64].addmm_(square[:64, :64], a)  # one storage for what is read and written
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            a @ a[:32]
        with pytest.raises(RuntimeError, match="dtype"):
            a @ a.float()
    assert not calls


@pytest.mark.parametrize("kind", ["tiles", "dots", "unknown"])
def test_a_processor_with_products_of_its_own_keeps_them(calls, monkeypatch, kind):
    monkeypatch.setattr(widened, "bf16_products", lambda: kind)
    a = random(64, 64)
    with lab.fast_products():
        a @ a
    assert not calls


@pytest.mark.parametrize(
    ("machine", "capability", "amx", "avx512", "kind"),
    [
        ("x86_64", "AVX512", True, True, "tiles"),
        ("AMD64", "AVX512", False, True, "dots"),
        ("x86_64", "AVX512", False, False, "emulation"),
        ("x86_64", "AVX2", True, True, "emulation"),  # hidden from torch
        ("arm64", "DEFAULT", False, False, "unknown"),
    ],
)
def test_what_multiplies_bfloat16(monkeypatch, machine, capability, amx, avx512, kind):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    assert device.bf16_products() == kind
