"""SLTrain layers: against autograd of the dense formula, what they keep, and their support."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab import refactorize_
from lowrank_lab.layers.sltrain import SLTrainLinear, random_support

SHAPES = [(7, 5, 1, 0.3), (7, 5, 3, 0.3), (5, 7, 5, 0.03), (6, 6, 6, 1.0), (1, 4, 1, 0.0)]
shapes = pytest.mark.parametrize(("m", "n", "rank", "sparsity"), SHAPES)
biases = pytest.mark.parametrize("bias", [True, False])
keeping = pytest.mark.parametrize("keep_weight", [False, True])


def sltrain(m, n, rank, sparsity=0.3, bias=True, dtype=torch.float32, **options):
    """A layer whose B is not zero, as after some training."""
    torch.manual_seed(0)
    linear = nn.Linear(n, m, bias=bias, dtype=dtype)
    layer = SLTrainLinear(linear, rank, sparsity=sparsity, **options)
    nn.init.normal_(layer.B)
    return layer


def formula(layer, x, B, A, values, bias=None):
    """The same by ordinary operations, with S as a dense matrix."""
    S = torch.zeros(layer.out_features, layer.in_features, dtype=values.dtype)
    rows, columns = layer.indices.long() // layer.in_features, layer.indices.long() % x.shape[-1]
    S = S.index_put((rows, columns), values)
    return x @ (layer.scale * B @ A + S).T + (0 if bias is None else bias)


def function(layer):
    """x and the layer's parameters → y, as gradcheck wants it."""
    names = [name for name, _ in layer.named_parameters()]

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    return forward


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def kept_bytes(layer, x):
    """Bytes that autograd keeps of y = layer(x), parameters and the indices aside."""
    own = {t.data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    sizes = {}

    def keep(t):
        if t.data_ptr() not in own:
            sizes[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    return sum(sizes.values())


# The function


@keeping
@biases
@shapes
def test_outputs_and_gradients_are_those_of_the_dense_formula(
    m, n, rank, sparsity, bias, keep_weight
):
    layer = sltrain(m, n, rank, sparsity, bias, torch.float64, keep_weight=keep_weight)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, expected = layer(x), formula(layer, *inputs)
    assert relative(out, expected) <= 1e-13
    assert relative(out, F.linear(x, layer.dense_weight(), layer.bias)) <= 1e-13
    weights = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, weights)
    reference = torch.autograd.grad(expected, inputs, weights)
    for g, wanted in zip(ours, reference, strict=True):
        assert g.shape == wanted.shape
        assert (g - wanted).norm() <= 1e-13 * wanted.norm()


@keeping
@biases
@shapes
def test_gradients_are_those_of_finite_differences(m, n, rank, sparsity, bias, keep_weight):
    layer = sltrain(m, n, rank, sparsity, bias, torch.float64, keep_weight=keep_weight)
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function(layer), (x, *layer.parameters()))


@pytest.mark.parametrize("trains", ["x", "B", "A", "values", "bias"])
def test_each_input_can_be_the_only_one_that_needs_a_gradient(trains):
    layer = sltrain(7, 5, 3, dtype=torch.float64)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    inputs = [torch.randn(2, 5, dtype=torch.float64), *(p.detach() for p in layer.parameters())]
    chosen = inputs[names.index(trains)].requires_grad_()
    out = function(layer)(*inputs)
    expected = formula(layer, *inputs)
    ours = torch.autograd.grad(out.square().sum(), chosen)[0]
    reference = torch.autograd.grad(expected.square().sum(), chosen)[0]
    assert relative(ours, reference) <= 1e-13


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_inputs_of_any_shape_pass_through(shape):
    layer = sltrain(7, 5, 2)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (*shape[:-1], 7)
    assert torch.allclose(out, formula(layer, x, *layer.parameters()), atol=1e-5)
    assert x.grad.shape == shape
    assert [p.grad.shape for p in layer.parameters()] == [p.shape for p in layer.parameters()]
    assert x.numel() or not layer.B.grad.any()


def test_strided_inputs_and_gradients_are_handled():
    layer = sltrain(7, 5, 3)
    x = torch.randn(5, 4).T.requires_grad_()
    ours = torch.autograd.grad(layer(x).T.flatten()[::2].sum(), [x, *layer.parameters()])
    expected = formula(layer, x, *layer.parameters()).T.flatten()[::2].sum()
    reference = torch.autograd.grad(expected, [x, *layer.parameters()])
    assert all(relative(g, w) <= 1e-6 for g, w in zip(ours, reference, strict=True))


def test_a_second_derivative_is_refused_rather_than_wrong():
    layer = sltrain(7, 5, 3)
    loss = layer(torch.randn(2, 5)).square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.B, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@keeping
@shapes
def test_bfloat16_is_right_within_its_rounding(m, n, rank, sparsity, keep_weight):
    layer = sltrain(m, n, rank, sparsity, dtype=torch.bfloat16, keep_weight=keep_weight)
    x = torch.randn(8, n, dtype=torch.bfloat16, requires_grad=True)
    inputs = [x, *layer.parameters()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = layer(x), formula(layer, *wide)
    assert out.dtype == torch.bfloat16
    assert relative(out.double(), expected) <= 2**-6
    ours = torch.autograd.grad(out.sum(), inputs)
    for t, g, wanted in zip(inputs, ours, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert g.dtype == t.dtype == torch.bfloat16
        assert (g.double() - wanted).norm() <= 2**-6 * wanted.norm()


@keeping
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters_dtype(
    input_dtype, keep_weight
):
    layer = sltrain(24, 16, 4, keep_weight=keep_weight)
    low = copy.deepcopy(layer).bfloat16()
    x = torch.randn(8, 16, dtype=input_dtype, requires_grad=True)
    x_low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.square().sum().backward()
    low(x_low).square().sum().backward()
    assert torch.equal(out, low(x_low))
    assert x.grad.dtype == input_dtype
    for p, q in zip([x, *layer.parameters()], [x_low, *low.parameters()], strict=True):
        assert torch.equal(p.grad, q.grad.to(p.dtype))


def test_a_backward_pass_inside_autocast_uses_the_dtype_of_the_forward_pass():
    layer = sltrain(24, 16, 4)
    x = torch.randn(8, 16)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.B)[0]
    loss = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(loss, layer.B)[0], expected)


def test_the_dense_weight_can_be_formed_under_autocast():
    layer = sltrain(24, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        W = layer.dense_weight()
    assert relative(W.float(), layer.dense_weight()) <= 2**-7


def test_double_precision_stays_double_under_autocast():
    layer = sltrain(7, 5, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_the_input_alone(dtype, autocast):
    layer = sltrain(48, 32, 4, dtype=dtype)
    x = torch.randn(10, 32, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert kept_bytes(layer, x) == x.nbytes
        layer.keep_weight = True
        size = 2 if autocast else x.element_size()
        assert kept_bytes(layer, x) == x.nbytes + 48 * 32 * size


def test_it_runs_on_fake_and_meta_tensors():
    with FakeTensorMode():
        layer = sltrain(6, 8, 2)
        x = torch.ones(3, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.sum().backward()
        assert layer.values.grad.shape == layer.indices.shape == (14,)
        assert x.grad.shape == x.shape
    with torch.device("meta"):
        layer = SLTrainLinear(nn.Linear(4096, 11008), 8)
    assert layer.indices.shape == (math.floor(0.03 * 4096 * 11008),)
    assert layer.indices.is_meta


# The layer


@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_is_its_sparse_part_and_keeps_the_bias(dtype, bias):
    linear = nn.Linear(200, 300, bias=bias, dtype=dtype)
    layer = SLTrainLinear(linear, 16)
    assert layer.bias is linear.bias
    assert layer.scale == 2  # 32 / 16
    assert not layer.B.any()
    W = layer.dense_weight().detach()
    assert torch.equal(W.flatten()[layer.indices], layer.values)
    assert (W != 0).sum() == layer.values.numel() == 1800
    trained = [name for name, _ in layer.named_parameters()]
    assert trained == ["B", "A", "values"] + ["bias"] * bias
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_values_and_a_start_uniform_within_one_over_the_root_of_the_fan_in():
    torch.manual_seed(0)
    layer = SLTrainLinear(nn.Linear(200, 300), 16)
    for drawn in (layer.values, layer.A):
        values = drawn.detach() * math.sqrt(200)
        assert 0.99 < values.abs().max() <= 1 + 1e-6
        assert values.mean().abs() < 0.05
        assert values.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)


@shapes
def test_refactorization_touches_the_factors_alone(m, n, rank, sparsity):
    layer = sltrain(m, n, rank, sparsity, dtype=torch.float64)
    values, indices = layer.values.detach().clone(), layer.indices.clone()
    x = torch.randn(4, n, dtype=torch.float64)
    W, out = layer.dense_weight().detach(), layer(x).detach()
    assert refactorize_(layer).changed == [""]
    B, A = (factor.detach() for factor in layer.factors())
    assert relative(B.T @ B, A @ A.T) <= 1e-12
    assert torch.equal(layer.values, values)
    assert torch.equal(layer.indices, indices)
    assert relative(layer.dense_weight(), W) <= 1e-12
    assert relative(layer(x), out) <= 1e-12


def test_refactorization_leaves_a_new_layer_alone():
    layer = SLTrainLinear(nn.Linear(5, 7), 2)
    A = layer.A.detach().clone()
    assert refactorize_(layer).rank_deficient == [""]
    assert torch.equal(layer.A, A)


def test_a_saved_layer_comes_back_with_its_support():
    layer, other = sltrain(7, 5, 2), SLTrainLinear(nn.Linear(5, 7), 2, sparsity=0.3)
    assert not torch.equal(layer.indices, other.indices)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), other(x))
    assert other.bfloat16().indices.dtype == torch.int32


def test_a_layer_learns_a_low_rank_plus_sparse_matrix():
    torch.manual_seed(0)
    layer = SLTrainLinear(nn.Linear(16, 16, bias=False), 2, sparsity=0.2)
    target = copy.deepcopy(layer).requires_grad_(False)
    target.B.normal_(), target.A.normal_(), target.values.normal_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0, fused=True)
    x = torch.randn(128, 16)
    for _ in range(600):
        optimizer.zero_grad()
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 * target(x).square().mean()


@pytest.mark.parametrize("sparsity", [0.0, 0.01])
def test_without_sparse_entries_it_is_a_low_rank_layer_that_still_trains(sparsity):
    layer = sltrain(7, 5, 2, sparsity)
    assert layer.values.shape == layer.indices.shape == (0,)
    x = torch.randn(3, 5)
    assert relative(layer(x), F.linear(x, layer.scale * layer.B @ layer.A, layer.bias)) <= 1e-6
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(x).sum().backward()
    optimizer.step()
    assert layer.B.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "spectral"}, r"^init: 'spectral' is not allowed; kaiming"),
        ({"sparsity": -0.1}, r"^sparsity: -0\.1 is not allowed; from 0 to 1"),
        ({"sparsity": 1.5}, r"^sparsity: 1\.5 "),
        ({"sparsity": float("nan")}, r"^sparsity: nan "),
        ({"rank": 0}, r"^rank: 0 "),
        ({"rank": 6}, r"^rank: 6 .* 7×5 layer"),
    ],
)
def test_a_bad_request_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SLTrainLinear(nn.Linear(5, 7), **{"rank": 2, **options})


def test_a_layer_with_more_entries_than_int32_can_number_is_refused():
    with pytest.raises(ValueError, match=r"^linear: 65536×32768 is not allowed; .*2³¹"):
        SLTrainLinear(nn.Linear(32768, 65536, device="meta"), 8)


# The support


@pytest.mark.parametrize(
    ("size", "count"), [(1, 0), (1, 1), (10, 3), (10, 9), (10, 10), (1000, 500), (10**6, 30_000)]
)
def test_the_support_has_exactly_as_many_distinct_sorted_positions_as_asked(size, count):
    support = random_support(size, count)
    assert support.dtype == torch.int32
    assert support.shape == (count,)
    assert (support.diff() > 0).all()
    assert count == 0 or (support[0] >= 0 and support[-1] < size)


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 3), (6, 3)])
def test_every_support_is_equally_likely(size, count):
    chance = torch.Generator().manual_seed(0)
    trials, kinds = 3000, math.comb(size, count)
    seen = {}
    for _ in range(trials):
        key = tuple(random_support(size, count, chance).tolist())
        seen[key] = seen.get(key, 0) + 1
    expected = trials / kinds
    assert len(seen) == kinds
    chi_square = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi_square < (kinds - 1) + 4 * math.sqrt(2 * (kinds - 1))


def test_the_support_of_a_layer_covers_rows_and_columns_evenly():
    torch.manual_seed(0)
    layer = SLTrainLinear(nn.Linear(400, 300), 1)
    flat = layer.indices.long()
    for positions, bins in ((flat // 400, 300), (flat % 400, 400)):
        counts = positions.bincount(minlength=bins).double()
        expected = flat.numel() / bins
        chi_square = ((counts - expected).square() / expected).sum() / bins
        assert 0.7 < chi_square < 1.3


def test_the_support_follows_the_seed_or_the_given_generator():
    def support(seed, generator=None):
        torch.manual_seed(seed)
        return SLTrainLinear(nn.Linear(40, 30), 2, generator=generator).indices

    assert torch.equal(support(1), support(1))
    assert not torch.equal(support(1), support(2))
    given = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(support(1, given[0]), support(2, given[1]))


def test_the_support_of_a_large_layer_needs_no_memory_for_its_dense_positions():
    size = 2**31 - 1  # as a permutation: 17 GB
    support = random_support(size, 1000)
    assert support.shape == (1000,)
    assert (support.diff() > 0).all()
    assert support[0] >= 0
