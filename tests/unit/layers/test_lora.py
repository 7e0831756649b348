"""LoRA layers against peft and dense weights; ReLoRA's merge, warm start and pruning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses import FakeTensorMode

from lowrank_lab import refactorize_
from lowrank_lab.layers.lora import LoRALinear, merge_, train_dense_
from lowrank_lab.techniques import prune_moments_

SHAPES = [(7, 5, 1), (7, 5, 3), (5, 7, 5), (6, 6, 6), (1, 4, 1)]  # out, in, rank
shapes = pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
biases = pytest.mark.parametrize("bias", [True, False])
prunings = pytest.mark.parametrize("how", ["magnitude", "random"])


def lora(m, n, rank, bias=True, dtype=torch.float32, **options):
    """A layer whose B is not zero, as after some training."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(n, m, bias=bias, dtype=dtype), rank, **options)
    nn.init.normal_(layer.B)
    return layer


def two_layers(dtype=torch.float32):
    first, second = lora(6, 5, 2, dtype=dtype), lora(4, 6, 3, dtype=dtype)
    return nn.Sequential(first, nn.Tanh(), second)


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def stepped(p, optimizer, steps=3):
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=chance)
        optimizer.step()
    return optimizer.state[p]


# The layer


@biases
@pytest.mark.parametrize("alpha", [None, 5.0])
@shapes
def test_outputs_and_gradients_are_those_of_peft(m, n, rank, alpha, bias):
    layer = lora(m, n, rank, bias, alpha=alpha)
    net = nn.ModuleDict({"layer": nn.Linear(n, m, bias=bias)})
    net["layer"].weight.data.copy_(layer.base_weight)
    if bias:
        net["layer"].bias.data.copy_(layer.bias.detach())
    config = LoraConfig(r=rank, lora_alpha=alpha or 32, target_modules=["layer"])
    theirs = inject_adapter_in_model(config, net)["layer"]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    A.data.copy_(layer.A.data)
    B.data.copy_(layer.B.data)
    x = torch.randn(2, 3, n)
    assert relative(layer(x), theirs(x)) <= 1e-6
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert relative(layer.A.grad, A.grad) <= 1e-6
    assert relative(layer.B.grad, B.grad) <= 1e-6


@biases
@shapes
def test_outputs_and_gradients_are_those_of_the_dense_weight(m, n, rank, bias):
    layer = lora(m, n, rank, bias, torch.float64)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    out, expected = layer(x), F.linear(x, layer.dense_weight(), layer.bias)
    assert relative(out, expected) <= 1e-12
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    reference = torch.autograd.grad((expected * weights).sum(), inputs)
    for g, wanted in zip(ours, reference, strict=True):
        assert (g - wanted).norm() <= 1e-12 * wanted.norm()
    W = layer.base_weight + 32 / rank * layer.B @ layer.A
    assert torch.allclose(layer.dense_weight(), W, atol=0, rtol=1e-12)


@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_computes_what_the_dense_layer_did(dtype, bias):
    linear = nn.Linear(5, 7, bias=bias, dtype=dtype)
    layer = LoRALinear(linear, 3)
    x = torch.randn(4, 5, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    assert layer.bias is linear.bias
    assert layer.base_weight.data_ptr() == linear.weight.data_ptr()  # not a copy
    assert linear.weight.requires_grad  # the dense layer itself is left as it was
    assert {p.dtype for p in layer.parameters()} == {dtype}


@biases
def test_factors_and_bias_train_and_the_dense_weight_does_not(bias):
    layer = lora(7, 5, 3, bias)
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trains == {"B", "A"} | ({"bias"} if bias else set())
    assert layer.factors() == (layer.B, layer.A)
    layer(torch.ones(2, 5)).sum().backward()
    assert layer.base_weight.grad is None


def test_an_empty_batch_passes_through():
    layer = lora(4, 5, 2)
    out = layer(torch.zeros(0, 5))
    out.sum().backward()
    assert out.shape == (0, 4)
    assert not layer.B.grad.any()


@pytest.mark.parametrize("init", ["spectral", "zeros"])
def test_an_initialisation_that_makes_no_sense_here_is_refused(init):
    with pytest.raises(ValueError, match=rf"^init: '{init}' is not allowed; kaiming"):
        LoRALinear(nn.Linear(5, 7), 2, init=init)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_does_not_fit_the_layer_is_refused(rank):
    with pytest.raises(ValueError, match=f"^rank: {rank} "):
        LoRALinear(nn.Linear(5, 7), rank)


def test_refactorization_leaves_zero_factors_alone_and_balances_others():
    layer = lora(7, 5, 3)
    W, x = layer.dense_weight().detach(), torch.randn(4, 5)
    before, base = layer(x).detach(), layer.base_weight.clone()
    assert refactorize_(layer).changed == [""]
    B, A = (factor.detach() for factor in layer.factors())
    assert relative(B.T @ B, A @ A.T) <= 1e-5
    assert relative(layer(x), before) <= 1e-5
    assert relative(layer.dense_weight(), W) <= 1e-5
    assert torch.equal(layer.base_weight, base)
    new = LoRALinear(nn.Linear(5, 7), 3)
    A = new.A.detach().clone()
    assert refactorize_(new).rank_deficient == [""]
    assert torch.equal(new.A, A)
    assert not new.B.any()


# ReLoRA: merging


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
@shapes
def test_merging_leaves_the_function_unchanged(m, n, rank, dtype, tolerance):
    layer = lora(m, n, rank, dtype=dtype)
    before = layer.base_weight.double() + layer.scale * layer.B.double() @ layer.A.double()
    layer.merge_()
    assert relative(layer.dense_weight().double(), before) <= tolerance
    assert not layer.B.any()
    x = torch.randn(4, n, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))


def test_merging_in_bfloat16_rounds_once():
    layer = lora(64, 48, 8, dtype=torch.bfloat16)
    exact = layer.base_weight.double() + layer.scale * layer.B.double() @ layer.A.double()
    layer.merge_()
    assert (layer.base_weight.double() - exact).abs().le(2.0**-8 * exact.abs() + 1e-6).all()


def test_merging_draws_a_new_a_and_keeps_every_tensor_in_place():
    layer = lora(200, 300, 8)
    old = layer.A.detach().clone()
    parameters = {name: (p, p.data_ptr()) for name, p in layer.named_parameters()}
    layer.merge_(torch.Generator().manual_seed(1))
    now = {name: (p, p.data_ptr()) for name, p in layer.named_parameters()}
    assert all(now[k][0] is p and now[k][1] == at for k, (p, at) in parameters.items())
    assert not (old == layer.A).any()
    values = layer.A.detach() * 300**0.5  # uniform in ±1
    assert 0.99 < values.abs().max() <= 1
    assert values.std().item() == pytest.approx(3**-0.5, rel=0.05)


def test_merging_a_model_is_deterministic_in_the_seed_and_differs_between_layers():
    torch.manual_seed(0)
    drawn = []
    for seed in (7, 7, 8):
        torch.rand(1)  # the global generator plays no role
        net = two_layers()
        assert merge_(net, seed) == ["0", "2"]
        drawn.append((net[0].A.detach(), net[2].A.detach()))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    numbers = [A.flatten()[0].item() * A.shape[1] ** 0.5 for pair in drawn[1:] for A in pair]
    assert len({round(x, 4) for x in numbers}) == 4


def test_merging_a_model_does_not_touch_the_global_generator():
    net = two_layers()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    merge_(net, 0)
    assert torch.equal(torch.rand(1), expected)


def test_a_model_goes_on_learning_across_merges():
    torch.manual_seed(0)
    net = nn.Sequential(LoRALinear(nn.Linear(12, 12, bias=False), 1))
    x, target = torch.randn(64, 12), torch.randn(12, 12)
    wanted, errors = x @ target.T, []
    for part in range(13):
        optimizer = torch.optim.Adam([net[0].A, net[0].B], lr=0.03)
        for _ in range(60):
            loss = (net(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
        merge_(net, part)
    assert errors[-1] < 0.1 * errors[0]  # each round adds another rank


def test_merging_works_on_fake_tensors():
    with FakeTensorMode():
        net = two_layers()
        net(torch.ones(3, 5)).sum().backward()
        assert merge_(net, 0) == ["0", "2"]
        assert net[0].base_weight.shape == (6, 5)


# ReLoRA: the full-rank warm start


def test_the_warm_start_trains_the_dense_weight_and_leaves_the_factors():
    net = nn.Sequential(LoRALinear(nn.Linear(5, 6), 2))
    layer, optimizer = net[0], torch.optim.AdamW(net.parameters(), lr=0.1)
    for on in (True, False):
        assert train_dense_(net, on) == ["0"]
        before = copy.deepcopy(net.state_dict())
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == ({"0.base_weight", "0.bias"} if on else {"0.B", "0.A", "0.bias"})
        assert layer.base_weight.requires_grad is on


def test_the_gradient_of_what_no_longer_trains_is_dropped():
    net = nn.Sequential(lora(6, 5, 2))
    net(torch.ones(2, 5)).sum().backward()
    train_dense_(net, True)
    assert net[0].B.grad is None
    assert net[0].A.grad is None
    assert net[0].bias.grad is not None


# ReLoRA: pruning Adam's moments


@pytest.mark.parametrize("keep", [0, 0.01, 0.1, 0.37, 1])
@pytest.mark.parametrize("amsgrad", [False, True])
@prunings
def test_pruning_zeroes_the_same_entries_of_all_moments_and_no_other(how, keep, amsgrad):
    p = nn.Parameter(torch.zeros(20, 15))
    optimizer = torch.optim.AdamW([p], amsgrad=amsgrad)
    before = copy.deepcopy(stepped(p, optimizer))
    assert prune_moments_(optimizer, [p], keep, how, seed=1) == 1
    kept = optimizer.state[p]["exp_avg"] != 0
    assert kept.sum() == round(keep * 300)
    for name, value in before.items():
        expected = value if name == "step" else value * kept
        assert torch.equal(optimizer.state[p][name], expected), name


def test_magnitude_keeps_the_largest_moments():
    p = nn.Parameter(torch.zeros(20, 15))
    optimizer = torch.optim.AdamW([p])
    moment = stepped(p, optimizer)["exp_avg"].clone()
    prune_moments_(optimizer, [p], 0.1, "magnitude")
    kept = optimizer.state[p]["exp_avg"] != 0
    assert moment[kept].abs().min() > moment[~kept].abs().max()


def test_of_equal_moments_the_first_survive():
    p = nn.Parameter(torch.zeros(2, 4))
    optimizer = torch.optim.AdamW([p])
    state = stepped(p, optimizer, 1)
    state["exp_avg"].copy_(torch.tensor([[1.0, -3, 0, 3], [-1, 1, 3, 0]]))
    state["exp_avg_sq"].fill_(2)
    prune_moments_(optimizer, [p], 0.5, "magnitude")
    assert state["exp_avg"].tolist() == [[1, -3, 0, 3], [0, 0, 3, 0]]
    assert state["exp_avg_sq"].tolist() == [[2, 2, 0, 2], [0, 0, 2, 0]]


@prunings
def test_pruning_moments_of_zero_still_prunes_the_second_moment(how):
    p = nn.Parameter(torch.zeros(4, 5))
    optimizer = torch.optim.AdamW([p])
    state = stepped(p, optimizer, 1)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].fill_(float("inf"))
    prune_moments_(optimizer, [p], 0.25, how)
    assert (state["exp_avg_sq"] != 0).sum() == 5
    assert not state["exp_avg_sq"].isnan().any()  # cleared, not multiplied by 0


def test_random_pruning_is_deterministic_in_the_seed_and_differs_between_parameters():
    def kept(seed):
        params = [nn.Parameter(torch.zeros(40, 5)) for _ in range(2)]
        optimizer = torch.optim.AdamW(params)
        for p in params:
            stepped(p, optimizer)
        prune_moments_(optimizer, params, 0.5, "random", seed=seed)
        return [optimizer.state[p]["exp_avg"] != 0 for p in params]

    first, again, other = kept(1), kept(1), kept(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_only_the_given_parameters_that_have_moments_are_pruned():
    params = [nn.Parameter(torch.zeros(3, 3)) for _ in range(3)]
    optimizer = torch.optim.AdamW(params)
    stepped(params[0], optimizer), stepped(params[1], optimizer)
    assert prune_moments_(optimizer, params[1:], 0) == 1
    assert optimizer.state[params[0]]["exp_avg"].all()
    assert not optimizer.state[params[1]]["exp_avg"].any()
    assert params[2] not in optimizer.state


@prunings
def test_quantized_moments_can_be_pruned(how):
    eight_bit = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    p = nn.Parameter(torch.zeros(32, 32))
    optimizer = torch.optim.AdamW([p])
    state = {
        name: eight_bit.zeros((32, 32), name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")
    }
    for moment in state.values():
        moment.copy_(torch.rand(32, 32) + 1)
    optimizer.state[p].update(state)
    prune_moments_(optimizer, [p], 0.25, how)
    first, second = (moment.dequantize() for moment in state.values())
    assert (first != 0).sum() == 256
    assert torch.equal(first != 0, second != 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": 1.1}, r"^keep: 1\.1 is not allowed; from 0 to 1"),
        ({"keep": -0.1}, r"^keep: -0\.1 "),
        ({"keep": float("nan")}, r"^keep: nan "),
        ({"how": "svd"}, r"^how: 'svd' is not allowed; magnitude or random"),
    ],
)
def test_a_bad_pruning_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        prune_moments_(torch.optim.AdamW(lora(4, 4, 2).parameters()), [], **{"keep": 0.1, **keys})
