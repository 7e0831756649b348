"""How layers start: empty (meta) models, resets, weights of low rank; positions that survive."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import swa_utils

from lowrank_lab.layers import KINDS, LowRankLinear, SLTrainLinear, balance, factorize, imbalance
from lowrank_lab.layers.support import Positions

kinds = pytest.mark.parametrize("kind", KINDS)


def net(kind="sltrain", device="cpu", rank=3, **options):
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(200, 120), nn.Tanh(), nn.Linear(120, 200))
    return factorize(model, kind, rank=rank, target=".", **options)


# Positions

AVERAGES = {
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.999)},
    "ema by tensor": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "mean": {},
}


@pytest.mark.parametrize("how", AVERAGES)
def test_averages_of_weights_leave_the_positions(how):
    model = net()
    average = swa_utils.AveragedModel(model, use_buffers=True, **AVERAGES[how])
    for _ in range(5):
        with torch.no_grad():
            model[0].values.add_(0.01)
        average.update_parameters(model)
    assert torch.equal(average.module[0].indices, model[0].indices)
    assert not torch.equal(average.module[0].values, model[0].values)  # these are averaged
    ours = average.module.state_dict()["0.indices"]
    ours.copy_(0.9 * ours + 0.1 * model[0].indices)  # as averages of state dicts do
    assert torch.equal(average.module[0].indices, model[0].indices)


MOVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("how", MOVES)
def test_positions_survive_moves(how):
    model = net()
    expected = [model[i].indices.clone() for i in (0, 2)]
    moved = MOVES[how](model)
    for layer, indices in zip((moved[0], moved[2]), expected, strict=True):
        assert torch.equal(layer.indices, indices)
        assert layer.indices.dtype == torch.int32
        assert isinstance(layer.indices, Positions)
        layer.reset_parameters()
        dense = layer.dense_weight().flatten()
        assert torch.equal(dense[indices], layer.values)  # these are the positions it uses


@pytest.mark.parametrize("assign", [False, True])
def test_positions_are_those_of_a_loaded_state_which_has_ordinary_tensors(assign):
    model, file = net(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {type(t) for t in state.values()} == {torch.Tensor}
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(200, 120), nn.Tanh(), nn.Linear(120, 200))
    factorize(other, "sltrain", rank=3, target=".").load_state_dict(state, assign=assign)
    x = torch.randn(4, 200)
    assert torch.equal(other(x), model(x))
    assert isinstance(other[0].indices, Positions)


def test_data_that_fsdp_exchanges_under_a_buffer_is_used():
    layer = net()[0]
    layer.indices.data = layer.indices.flip(0).clone()
    dense = layer.dense_weight().flatten()
    assert torch.equal(dense[layer.indices.long()], layer.values)


def test_positions_of_an_empty_layer_come_from_a_seed():
    def made(seed):
        with torch.device("meta"):
            linear = nn.Linear(40, 30)
        generator = torch.Generator().manual_seed(seed)
        return SLTrainLinear(linear, 2, sparsity=0.2, generator=generator)

    first, again, other = made(1), copy.deepcopy(made(1)), made(2)
    for layer in (first, again, other):
        assert layer.indices.is_meta
        layer.to_empty(device="cpu")
        assert layer.indices.shape == (240,)
        assert (layer.indices.diff() > 0).all()
        assert layer.indices[0] >= 0
        assert layer.indices[-1] < 1200
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)


def test_compiled_layers_take_the_positions():
    model, x = net(), torch.randn(4, 200)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# reset_parameters


def assert_fresh(layer, kind):
    """The distributions of a new layer: uniform within ±1/√columns, or zero; CoLA's normal."""
    n, rank = layer.in_features, layer.rank
    widths = {"A": n, "bias": n, "values": n, "base_weight": n, "B": rank}
    for name, p in layer.named_parameters():
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        if name == "B" and kind in ("lora", "sltrain"):
            assert not p.any()
            continue
        if kind == "cola" and name != "bias":
            assert p.std().item() == pytest.approx((rank * 320) ** -0.25, rel=0.15)
            continue
        scaled = p.detach() * math.sqrt(widths[name])
        assert 0.9 < scaled.abs().max() <= 1 + 1e-6
        assert scaled.std().item() == pytest.approx(3**-0.5, rel=0.15)


@kinds
def test_a_reset_after_to_empty_gives_a_new_layer(kind):
    model = net(kind, "meta").to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    for layer in (model[0], model[2]):
        layer.reset_parameters()
        assert_fresh(layer, kind)
    assert model(torch.randn(3, 200)).isfinite().all()


@kinds
def test_fsdp_s_usual_start_from_an_empty_model_trains(kind, tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = net(kind, "meta")
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for layer in (model[0], model[2]):
            assert_fresh(layer, kind)
        optimizer, x = torch.optim.AdamW(model.parameters(), lr=0.01), torch.randn(8, 200)
        losses = []
        for _ in range(5):
            loss = (model(x) - x).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
    finally:
        dist.destroy_process_group()


def test_a_spectral_layer_is_reset_to_the_split_of_a_new_weight():
    layer = net("low-rank", init="spectral")[0]
    before = layer.dense_weight().detach()
    layer.reset_parameters()
    assert not torch.allclose(layer.dense_weight(), before)
    torch.testing.assert_close(layer.B.T @ layer.B, layer.A @ layer.A.T, rtol=1e-4, atol=1e-5)


# Weights that a spectral start can't split


@pytest.mark.parametrize("rank_of_weight", [0, 1, 3])
@pytest.mark.parametrize(("m", "n", "rank"), [(9, 7, 5), (5, 8, 5), (6, 6, 4)])
def test_a_spectral_start_of_a_weight_of_low_rank_keeps_it_and_still_trains(
    m, n, rank, rank_of_weight
):
    torch.manual_seed(0)
    linear = nn.Linear(n, m)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, rank_of_weight) @ torch.randn(rank_of_weight, n))
    model, W = nn.Sequential(linear), linear.weight.detach().clone()
    with pytest.warns(UserWarning, match=rf"^init: 'spectral' of 0, .* rank {rank_of_weight}:"):
        factorize(model, rank=rank, target="0", init="spectral")
    layer = model[0]
    assert layer.drawn_rows == rank - rank_of_weight
    torch.testing.assert_close(layer.dense_weight(), W, rtol=1e-4, atol=1e-5)
    layer(torch.randn(20, n)).square().sum().backward()
    alive = layer.B.grad.norm(dim=0) + layer.A.grad.norm(dim=1)
    assert (alive > 0).all()  # every pair of a column and a row


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spectral_start_of_numbers_that_are_none_is_refused_by_name(value):
    model = nn.Sequential(nn.Linear(5, 6))
    model[0].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"^init: 'spectral' .* NaN or infinity \(layer 0\)$"):
        factorize(model, rank=2, target="0", init="spectral")


def test_a_spectral_start_without_values_is_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(ValueError, match=r"^init: 'spectral' .* meta device \(layer 0\)$"):
        factorize(model, rank=2, target="0", init="spectral")


@kinds
def test_complex_weights_are_refused_by_name(kind):
    model = nn.Sequential(nn.Linear(5, 6, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^target: .*0 \(its weight is torch.complex64"):
        factorize(model, kind, rank=2, target="0")
    with pytest.raises(ValueError, match=r"^linear: a torch.complex64 weight is not allowed"):
        KINDS[kind](model[0], 2)


@pytest.mark.parametrize("of", [balance, imbalance])
def test_factors_that_have_no_balance_are_refused(of):
    B, A = torch.randn(6, 2), torch.randn(2, 5)
    for bad in (B * float("nan"), torch.full_like(B, float("inf"))):
        with pytest.raises(ValueError, match=r"^factors: NaN or infinity"):
            of(bad, A)
    with pytest.raises(ValueError, match=r"^factors: torch.complex64"):
        of(B.to(torch.complex64), A)


def test_a_frozen_layer_stays_frozen_by_any_way_of_making_it():
    linear = nn.Linear(5, 6)
    linear.weight.requires_grad_(False)
    assert not LowRankLinear(linear, 2).B.requires_grad
    assert not SLTrainLinear(linear, 2).values.requires_grad
    assert KINDS["lora"](linear, 2).A.requires_grad  # the usual way to fine-tune
