"""Low-rank layers and `factorize`: against dense weights, and models that it must refuse."""

import copy
import itertools
import math
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lowrank_lab import factorize
from lowrank_lab.layers import LoRALinear, LowRankLinear
from lowrank_lab.layers.association import association_flops, cheapest

SHAPES = [(7, 5, 1), (7, 5, 3), (5, 7, 5), (6, 6, 6), (1, 4, 1)]  # out, in, rank
inits = pytest.mark.parametrize("init", ["kaiming", "spectral"])


def dense(m, n, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=bias, dtype=dtype)


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


class Net(nn.Module):
    """A convolution, three linear layers and a norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.first = nn.Linear(12, 10)
        self.inner = nn.Sequential(nn.Linear(10, 8, bias=False), nn.LayerNorm(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(self.conv(x).flatten(1))))


@inits
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_the_output_is_that_of_the_dense_weight(m, n, rank, bias, init):
    layer = LowRankLinear(dense(m, n, bias, torch.float64), rank, init=init)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    expected = F.linear(x, layer.dense_weight(), layer.bias)
    assert relative(layer(x), expected) <= 1e-12
    assert torch.allclose(layer.dense_weight(), layer.scale * layer.B @ layer.A)


@inits
@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_and_the_dtype_are_those_of_the_dense_layer(bias, init):
    linear = dense(7, 5, bias, torch.bfloat16)
    layer = LowRankLinear(linear, 3, init=init)
    assert layer.bias is linear.bias
    assert layer.B.dtype == layer.A.dtype == torch.bfloat16
    assert layer(torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [name for name, _ in layer.named_parameters()] == ["B", "A"] + ["bias"] * bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 2.5])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_spectral_init_is_the_best_approximation_of_the_dense_weight(m, n, rank, alpha, dtype):
    linear = dense(m, n, dtype=dtype)
    W = linear.weight.detach().double()
    layer = LowRankLinear(linear, rank, alpha=alpha, init="spectral")
    S = torch.linalg.svdvals(W)
    error = (layer.dense_weight().detach().double() - W).norm()
    rounding = (1e-6 if dtype == torch.float32 else 2**-7) * W.norm()
    assert error <= S[rank:].norm() + rounding  # Eckart–Young: no rank-r matrix is closer
    B, A = (factor.detach().double() for factor in layer.factors())
    for gram in (B.T @ B, A @ A.T):
        assert (gram - (S[:rank] / layer.scale).diag()).norm() <= rounding / layer.scale


def test_kaiming_init_is_uniform_within_one_over_the_root_of_the_fan_in():
    layer = LowRankLinear(dense(300, 200), 16)
    for factor, fan_in in ((layer.B, 16), (layer.A, 200)):
        bound = 1 / math.sqrt(fan_in)
        values = factor.detach().flatten() / bound
        assert 0.99 < values.abs().max() <= 1
        assert values.mean().abs() < 0.05
        assert values.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_the_default_scale_is_one_and_for_kaiming_at_most_that_of_the_papers_alpha():
    assert LowRankLinear(dense(8, 8), 4).scale == 1
    assert LowRankLinear(dense(48, 48), 48).scale == 32 / 48
    assert LowRankLinear(dense(8, 8), 4, init="spectral").scale == 1
    assert LowRankLinear(dense(8, 8), 4, alpha=6).scale == 1.5


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_formula(bias):
    layer = LowRankLinear(dense(4, 5, bias, torch.float64), 2)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(forward, (x, *parameters))


def test_an_empty_batch_passes_through():
    layer = LowRankLinear(dense(4, 5), 2)
    out = layer(torch.zeros(0, 5))
    out.sum().backward()
    assert out.shape == (0, 4)
    assert not layer.B.grad.any()


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_does_not_fit_the_layer_is_refused(rank):
    with pytest.raises(ValueError, match=f"^rank: {rank} "):
        LowRankLinear(dense(7, 5), rank)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match=r"^init: 'zeros' "):
        LowRankLinear(dense(7, 5), 2, init="zeros")


# The association of products

ASSOCIATIONS = ["factors", "weight", "gradient"]
associations = pytest.mark.parametrize("association", ASSOCIATIONS)
based = pytest.mark.parametrize("base", [False, True])


def layer_with(association, base, m=7, n=5, rank=3, dtype=torch.float64):
    """A layer that is computed by the given association whatever the shapes."""
    layer = (LoRALinear if base else LowRankLinear)(dense(m, n, True, dtype), rank)
    nn.init.normal_(layer.B, std=0.1)
    layer.association = lambda x, base=False: association
    return layer


def gradients(layer, x, call=lambda layer, x: layer(x)):
    """The output and the gradients of x and the trained parameters."""
    x = x.detach().requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    out = call(layer, x)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def assert_close(ours, reference, tolerance):
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == b.dtype
        assert relative(a.double(), b.double()) <= tolerance


@pytest.mark.parametrize("trains", [False, True])
@based
@associations
def test_the_flops_of_an_association_are_those_that_are_counted(association, base, trains):
    layer = layer_with(association, base, 24, 40, 16)
    layer.B.requires_grad_(trains), layer.A.requires_grad_(trains)
    x = torch.randn(2, 9, 40, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    expected = association_flops(18, 24, 40, 16, base=base, trains=trains)[association]
    assert counter.get_total_flops() == expected


def test_the_cheapest_association_is_the_one_of_fewest_flops():
    sizes = itertools.product(
        [1, 64, 4096], [32, 48], [32, 200], [1, 16, 24, 32], *[[False, True]] * 2
    )
    chosen = set()
    for t, m, n, rank, base, trains in sizes:
        flops = association_flops(t, m, n, rank, base=base, trains=trains)
        best = cheapest(t, m, n, rank, base=base, trains=trains)
        assert flops[best] == min(flops.values())
        chosen.add((base, best))
    assert {(False, "factors"), (False, "gradient")} <= chosen
    assert chosen >= {(True, name) for name in ASSOCIATIONS}


def test_layers_choose_by_the_number_of_tokens():
    low_rank, lora = LowRankLinear(dense(64, 64), 48), LoRALinear(dense(64, 64), 16)
    assert [low_rank.association(torch.ones(t, 64)) for t in (0, 1, 1000)] == [
        "factors", "factors", "gradient",
    ]  # fmt: skip
    assert [lora.association(torch.ones(2, t, 64), base=True) for t in (1, 1000)] == [
        "factors", "weight",
    ]  # fmt: skip


@based
@associations
def test_every_association_gives_the_dense_weights_outputs_and_gradients(association, base):
    layer = layer_with(association, base)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = gradients(layer, x, lambda k, x: F.linear(x, k.dense_weight(), k.bias))
    assert_close(gradients(layer, x), expected, 1e-13)


@associations
def test_a_dense_weight_that_trains_gets_its_gradient_by_every_association(association):
    layer = layer_with(association, True)
    layer.base_weight.requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = gradients(layer, x, lambda k, x: F.linear(x, k.dense_weight(), k.bias))
    assert_close(gradients(layer, x), expected, 1e-13)


@based
@associations
def test_second_derivatives_are_right_by_every_association(association, base):
    layer = layer_with(association, base, 3, 4, 2)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*((k, p) for k, p in layer.named_parameters()), strict=True)
    values = [p.detach().requires_grad_() for p in values]

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradgradcheck(forward, (x, *values))


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
@pytest.mark.parametrize("autocast", [False, True])
@based
@associations
def test_every_association_can_be_checkpointed_and_compiled(association, base, autocast, how):
    layer = layer_with(association, base, 16, 24, 8, torch.float32)
    x = torch.randn(2, 5, 24)
    torch._dynamo.reset()
    call = {
        "checkpoint": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
        "compile": torch.compile(lambda k, x: k(x), backend="aot_eager", fullgraph=True),
    }[how]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, ours = gradients(layer, x), gradients(layer, x, call)
    assert_close(ours, expected, 2**-7 if autocast else 1e-6)


@based
def test_under_autocast_associations_differ_by_rounding_and_keep_dtypes(base):
    x, results = torch.randn(40, 24), []
    for association in ASSOCIATIONS:
        layer = layer_with(association, base, 16, 24, 8, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(layer, x))
    assert results[0][0].dtype == torch.bfloat16
    for result in results[1:]:
        assert_close(result, results[0], 2**-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_that_is_formed_is_not_kept(autocast):
    layer = layer_with("gradient", False, 16, 24, 8, torch.float32)
    own, kept = {p.data_ptr() for p in layer.parameters()}, {}
    x = torch.randn(40, 24, requires_grad=True)

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
        layer(x)
    assert sum(nbytes for at, nbytes in kept.items() if at not in own) == x.nbytes


def test_lora_does_not_round_its_sum_to_half_precision():
    layer = LoRALinear(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), 4)
    with torch.no_grad():
        layer.base_weight.copy_(torch.tensor([1, -1]).repeat(32))
        layer.A.fill_(1), layer.B.fill_(2**-15)  # scale · B A = 2⁻¹⁰ everywhere
    x = torch.ones(1000, 64, dtype=torch.bfloat16)
    assert layer.association(x, base=True) != "factors"
    assert torch.equal(layer(x), torch.full_like(x, 64 * 2**-10))


# factorize


def test_factorize_replaces_the_linear_layers_that_match_and_nothing_else():
    net = Net()
    others = {name: p for name, p in net.named_parameters() if "inner.0" not in name}
    others.pop("first.weight")
    assert factorize(net, rank=3, target=r"^(first|inner\.0|conv)$") is net
    kinds = {name: type(m) for name, m in net.named_modules() if name in ("conv", "last", "first")}
    assert kinds == {"conv": nn.Conv1d, "last": nn.Linear, "first": LowRankLinear}
    assert isinstance(net.inner[0], LowRankLinear)
    assert net.inner[0].B.shape == (8, 3)
    kept = dict(net.named_parameters())
    assert all(kept[name] is p for name, p in others.items())
    assert set(kept) - set(others) == {"first.B", "first.A", "inner.0.B", "inner.0.A"}


@pytest.mark.parametrize("rank", [1, 3])
def test_a_factorised_model_computes_with_the_dense_weights_of_its_layers(rank):
    net = factorize(Net(), rank=rank, target=".")
    plain = Net()
    for name, layer in net.named_modules():
        if isinstance(layer, LowRankLinear):
            plain.get_submodule(name).weight.data.copy_(layer.dense_weight())
    plain.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(4, 2, 6)
    assert relative(net(x), plain(x)) <= 1e-5


def test_at_full_rank_spectral_init_keeps_the_outputs():
    net = Net()
    x = torch.randn(4, 2, 6)
    before = net(x)
    factorize(net, rank=8, target="inner", init="spectral")
    assert relative(net(x), before) <= 1e-5


def test_options_reach_the_layers():
    net = factorize(Net(), rank=2, target="first", alpha=3.0, init="spectral")
    assert net.first.scale == 1.5


def test_factorizing_again_leaves_factorised_layers_alone():
    net = factorize(Net(), rank=2, target="first")
    first = net.first
    factorize(net, rank=3, target="first|last")
    assert net.first is first
    assert isinstance(net.last, LowRankLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "attention"}, r"^target: 'attention' matches no"),
        ({"target": "conv"}, r"^target: 'conv' matches no"),
        ({}, r"^target: "),  # the default names a transformer's projections
        ({"target": ".", "rank": 4}, r"^rank: 4 .* 3×8 layer"),
        ({"target": ".", "rank": 0}, r"^rank: 0 "),
        ({"target": ".", "kind": "lowrank"}, r"^kind: 'lowrank' .*low-rank"),
        ({"target": ".", "init": "zeros"}, r"^init: 'zeros' "),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_model_untouched(options, message):
    net = Net()
    modules, state = dict(net.named_modules()), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        factorize(net, **{"rank": 2, **options})
    assert "\n" not in str(refusal.value)
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_a_weight_shared_with_another_module_is_refused():
    net = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    net["head"].weight = net["embedding"].weight
    with pytest.raises(ValueError, match=r"^target: head shares its weight with embedding"):
        factorize(net, rank=2, target="head")
    assert isinstance(net["head"], nn.Linear)


def test_a_layer_used_in_two_places_stays_one_layer_or_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    with suppress(ValueError):
        factorize(net, rank=2, target=r"^(0|2)$")
    assert net[0] is net[2]


def test_a_layer_whose_owner_reads_its_weight_still_works_or_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    with suppress(ValueError):
        factorize(attention, rank=2, target="out_proj")
    x = torch.randn(3, 2, 8)
    assert attention(x, x, x)[0].shape == x.shape


def test_a_bare_linear_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^(target|model): "):
        factorize(nn.Linear(4, 4), rank=2, target=".*")
