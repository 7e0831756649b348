"""Float32 products of the CPU: by oneDNN within a block, the usual ones before and after it."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

import lowrank_lab as lab
from lowrank_lab import device
from lowrank_lab.cpu import products
from lowrank_lab.kernels import operators as kernels

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)
SHAPES = [  # m, k, n
    (256, 64, 64), (64, 4096, 176), (176, 4096, 64), (512, 16, 333), (4096, 64, 1), (1, 512, 1024),
    (700, 1, 700), (129, 130, 131), (9000, 130, 40), (9000, 40, 130), (40, 130, 9000),
    (9000, 200, 130), (9000, 130, 200),
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """A processor on which MKL is slow, no C++ compiler, and the shapes of oneDNN's calls."""
    found = []

    def recorded(x, W, onednn=products._onednn):
        found.append((tuple(x.shape), tuple(W.shape)))
        assert W.is_contiguous() or W.T.is_contiguous()  # else it takes a thousand times longer
        return onednn(x, W)

    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products.kernels, "available", lambda: False)
    monkeypatch.setattr(products, "SMALL_RESULT", 0)
    monkeypatch.setattr(products, "_onednn", recorded)
    return found


def random(rows, columns, transposed=False):
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


def assert_product(found, a, b, plus=0.0):
    exact = a.double() @ b.double() + plus
    scale = a.double().abs() @ b.double().abs() + 1
    assert ((found - exact).abs() <= 2e-6 * scale).all()
    assert found.is_contiguous()


@pytest.mark.parametrize("transposed", [(x, y) for x in (False, True) for y in (False, True)])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products_are_those_of_float64(calls, m, k, n, transposed):
    a, b = random(m, k, transposed[0]), random(k, n, transposed[1])
    base, wide = torch.randn(m, n), torch.zeros(m, n + 3)
    with products.fast_products():
        assert_product(torch.mm(a, b), a, b)
        assert_product(torch.addmm(base, a, b, alpha=-0.5), -0.5 * a, b, base)
        assert_product(torch.addmm(base.new_zeros(()), a, b, beta=0, alpha=3), 3 * a, b)
        assert_product(torch.addmm(base[0], a, b), a, b, base[0])
        assert_product(base.clone().addmm_(a, b, alpha=2.0), 2 * a, b, base)
        assert_product(torch.mm(a, b, out=torch.empty(m, n)), a, b)
        torch.mm(a, b, out=wide[:, 3:])
    assert_product(wide[:, 3:].contiguous(), a, b)
    assert not wide[:, :3].any()
    assert calls if m * k * n >= products.SMALLEST else not calls


@pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
@pytest.mark.parametrize("transposed", [(x, y) for x in (False, True) for y in (False, True)])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("amd", [False, True])
def test_products_of_our_kernel_are_those_of_float64(monkeypatch, amd, m, k, n, transposed):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    monkeypatch.setattr(products, "is_amd", lambda: amd)
    calls = []
    ours = kernels.product
    monkeypatch.setattr(kernels, "product", lambda a, b, out: calls.append(a) or ours(a, b, out))
    a, b = random(m, k, transposed[0]), random(k, n, transposed[1])
    base, wide = torch.randn(m, n), torch.zeros(m, n + 3)
    with products.fast_products():
        assert_product(torch.mm(a, b), a, b)
        assert_product(torch.addmm(base, a, b, alpha=-0.5), -0.5 * a, b, base)
        assert_product(base.clone().addmm_(a, b, alpha=2.0), 2 * a, b, base)
        assert_product(torch.mm(a, b, out=torch.empty(m, n)), a, b)
        torch.mm(a, b, out=wide[:, 3:])
    assert_product(wide[:, 3:].contiguous(), a, b)
    assert not wide[:, :3].any()
    many = m >= products.FEWEST_ROWS and m * k * n >= products.SMALLEST
    small = k * n <= products.SMALL_WEIGHT and (m >= 4 * n or a.is_contiguous())
    assert bool(calls) is (many and (amd or small))
    assert_product(ours(a, b, torch.full((m, n), torch.nan)), a, b)


def test_small_transposed_products_are_left_to_MKL(calls, monkeypatch):
    monkeypatch.setattr(products, "SMALL_RESULT", 2**16)
    x, dY, wide = torch.randn(4096, 64), torch.randn(4096, 176), torch.randn(4096, 2048)
    with products.fast_products():
        dY.T @ x
        assert not calls
        wide.T @ x
        x @ dY[:64]
    assert len(calls) == 2


def test_nan_and_infinity_go_through(calls):
    a, b = torch.ones(256, 64), torch.ones(64, 64)
    a[0, 0], a[1, 0] = torch.nan, torch.inf
    with products.fast_products():
        found = a @ b
    assert calls
    assert found[0].isnan().all()
    assert found[1].isinf().all()
    assert (found[2:] == 64).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_computed_as_usual(calls, monkeypatch, dtype):
    monkeypatch.setattr(products.widened, "bf16_products", lambda: "dots")
    a, b = (torch.randn(128, 128).mul(9).to(dtype) for _ in range(2))
    usual = [a @ b, torch.addmm(a, a, b), a.clone().addmm_(a, b), torch.mm(a, b, out=a.clone())]
    with products.fast_products():
        same = [a @ b, torch.addmm(a, a, b), a.clone().addmm_(a, b), torch.mm(a, b, out=a.clone())]
    assert all(torch.equal(x, y) for x, y in zip(usual, same, strict=True))
    assert not calls


def test_what_oneDNN_would_not_take_is_computed_as_usual(calls):
    a = torch.randn(256, 256)
    strided, repeated, empty = a[::2, ::2], a[:1].expand(256, 256), a[:0]
    gaps = torch.randn(256, 300)[:, :256]
    square = a[:128].clone()
    with products.fast_products():
        assert torch.allclose(strided @ strided, strided.clone() @ strided.clone(), atol=1e-4)
        assert torch.allclose((repeated @ a)[7], a[0] @ a, atol=1e-4)
        assert torch.allclose(a @ gaps, a @ gaps.clone(), atol=1e-4)
        assert torch.allclose(gaps.T @ a, gaps.T.clone() @ a, atol=1e-4)
        calls.clear()
        assert (empty @ a).shape == (0, 256)
        assert_product(torch.addmm(a, a, a, beta=0.5), a, a, 0.5 * a)
        left, right, base = (t.clone() for t in (square[:, :128], square[:, 128:], square[:, :128]))
        written = square[:, :128].addmm_(left, square[:, 128:])  # one storage for what is read
        assert_product(written.contiguous(), left, right, base)
        assert torch.equal(square[:, :128], written)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            a @ a[:100]
        with pytest.raises(RuntimeError, match="dtype"):
            a @ a.double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TF32
            with torch.backends.mkldnn.flags(enabled=False):
                calls.clear()
                a @ a
    assert not calls


def test_gradients_and_second_derivatives_go_through(calls):
    x, W = torch.randn(8, 64, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True)

    def derivatives():
        (g,) = torch.autograd.grad(F.linear(x, W).tanh().sum(), W, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, W))

    usual = derivatives()
    with products.fast_products():
        found = derivatives()
    assert len(calls) > 4
    for a, b in zip(usual, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_a_drop_in_optimizer_leaves_the_products_of_the_process_alone(calls):
    W = torch.nn.Parameter(torch.randn(128, 128))
    W.grad = torch.randn(128, 128)
    optimizer = lab.optim.GaLore([{"params": [W], "rank": 16}], lr=0.1)
    optimizer.step()
    assert not calls
    with lab.fast_products():
        optimizer.step()
    assert calls


def test_the_usual_products_are_back_after_the_last_block(calls):
    a = torch.randn(128, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with products.fast_products(), products.fast_products():
                a @ a
            assert len(calls) == 1
            with pytest.raises(ZeroDivisionError), products.fast_products():
                1 / 0  # noqa: B018
            a @ a
            assert len(calls) == 1
            calls.clear()


def test_a_block_ends_while_another_thread_is_in_its_own(calls):
    a = torch.randn(128, 128)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with products.fast_products():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with products.fast_products():
        thread.start()
        assert inside.wait(10)
    a @ a
    assert len(calls) == 1
    leave.set()
    thread.join()
    a @ a
    assert len(calls) == 1


def test_nothing_is_done_where_MKL_is_fast(calls, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    with products.fast_products():
        torch.randn(128, 128) @ torch.randn(128, 128)
    assert not calls


@pytest.mark.parametrize(
    ("capability", "name", "slow"),
    [("AVX512", "AMD EPYC", True), ("AVX512", "Intel Xeon", False), ("AVX2", "AMD EPYC", False)],
)
def test_MKL_is_slow_on_processors_of_AMD_with_wide_vectors(monkeypatch, capability, name, slow):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(device, "is_amd", device.is_amd.__wrapped__)
    assert products.mkl_is_slow.__wrapped__() is slow


def test_training_uses_them_and_learns_the_same(calls, tmp_path, monkeypatch):
    config = lab.RunConfig(
        model="micro", corpus="markov", vocab_size=64, steps=6, batch=4, sequence_length=64,
        method="galore", rank=4, eval_tokens=256, test_tokens=256,
    )  # fmt: skip
    fast = lab.train(config, tmp_path / "fast").metrics
    count = len(calls)
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    usual = lab.train(config, tmp_path / "usual").metrics
    assert count > 6 * 20
    assert len(calls) == count
    assert list(fast["loss"]) == pytest.approx(list(usual["loss"]), abs=2e-4)
