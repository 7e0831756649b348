"""CoLA, y = B silu(A x): what it computes, keeps and refuses; blocks that recompute (CoLA-M)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_lab as lab
from lowrank_lab import InputError, RunConfig
from lowrank_lab.analysis.spectra import gradient_singular_values, singular_values
from lowrank_lab.layers import ColaLinear
from lowrank_lab.memory.formulas import activation_bytes
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.simulate import simulate
from lowrank_lab.techniques import refactorize_

SHAPES = [(7, 5, 1), (7, 5, 3), (5, 7, 5), (6, 6, 6), (1, 4, 1)]  # out, in, rank
NO_WEIGHT = "ColaLinear has an activation between its factors, and no dense weight"


def layer_of(m, n, rank, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return ColaLinear(nn.Linear(n, m, bias=bias, dtype=dtype), rank)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8, bias=False))
    return lab.factorize(model, "cola", rank=3, target=".")


def run_config(**values):
    return RunConfig(**{
        "model": "tiny", "method": "cola", "corpus": "markov", "batch": 4, "sequence_length": 16,
        "steps": 10, **values,
    })  # fmt: skip


def loss_and_gradients(config, seed=0):
    model, _ = build(resolve(config))
    tokens = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(seed))
    enabled = config.precision == "amp-bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


# The layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_the_output_and_gradients_are_those_of_the_equation(m, n, rank, bias):
    layer = layer_of(m, n, rank, bias)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    z = x @ layer.A.T
    expected = (z / (1 + (-z).exp())) @ layer.B.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)
    parts = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), parts)
    theirs = torch.autograd.grad(expected.square().sum(), parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_zero_inputs_and_zero_gradients_pass_through():
    layer = layer_of(4, 5, 2, bias=False)
    layer(torch.zeros(3, 5, dtype=torch.float64)).sum().backward()
    assert not layer.B.grad.any()
    assert not layer.A.grad.any()
    assert layer(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 4)


def test_both_factors_start_normal_with_the_authors_deviation():
    layer = layer_of(300, 200, 16)
    for factor in layer.factors():
        assert factor.std().item() == pytest.approx(16**-0.25 * 500**-0.25, rel=0.05)
        assert abs(factor.mean().item()) < 0.01
        assert (factor.abs() > 2 * factor.std()).double().mean() == pytest.approx(0.0455, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_moves_copies_and_compiles_as_any_layer(dtype):
    layer = layer_of(6, 5, 2).to(dtype)
    assert layer.B.dtype == layer.bias.dtype == dtype
    x = torch.randn(3, 5, dtype=dtype)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match=f"^rank: {rank} "):
        layer_of(7, 5, rank)


def test_an_initialisation_of_other_kinds_is_refused():
    with pytest.raises(ValueError, match=r"^init: 'spectral' is not allowed; normal"):
        lab.factorize(nn.Sequential(nn.Linear(4, 4)), "cola", rank=2, target=".", init="spectral")


# What needs a dense weight


def test_its_weight_has_a_shape_but_can_not_be_computed_with_or_written():
    layer = layer_of(6, 5, 2)
    assert (layer.weight.shape, layer.weight.dtype) == ((6, 5), torch.float64)
    reads = (layer.dense_weight, layer.merged_weight, lambda: layer.weight @ torch.ones(5).double())
    for read in (*reads, lambda: F.linear(torch.ones(5).double(), layer.weight)):
        with pytest.raises(ValueError, match=f"^weight: {NO_WEIGHT}"):
            read()
    with pytest.raises(ValueError, match=r"^weight: setting it is .*; ColaLinear has"):
        layer.weight = nn.Parameter(torch.zeros(6, 5))


@pytest.mark.parametrize("change", [lab.to_dense_, refactorize_])
def test_a_change_of_its_function_is_refused_before_anything_changes(change):
    model = net()
    lab.factorize(model.append(nn.Linear(8, 4)), "low-rank", rank=2, target="3")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^(model|module): '0' is not allowed; {NO_WEIGHT}$"):
        change(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert isinstance(model[0], ColaLinear)


def test_spectra_are_those_of_the_factors_and_say_so():
    model = net()
    start = {name: t.clone() for name, t in model.state_dict().items()}
    model(torch.randn(3, 8)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    table = lab.spectra(model, start=start).set_index("layer")
    assert list(table.index) == ["0[B]", "0[A]", "2[B]", "2[A]"]
    assert table["shape"]["2[A]"] == (3, 6)
    for name, row in table.iterrows():
        factor = getattr(model[int(name[0])], name[2])
        old = start[f"{name[0]}.{name[2]}"]
        for column, X in (
            ("singular_values", factor), ("update", factor - old), ("gradient", factor.grad),
        ):  # fmt: skip
            expected = torch.linalg.svdvals(X.detach())
            torch.testing.assert_close(torch.tensor(row[column]), expected, rtol=1e-4, atol=1e-6)
    for function in (singular_values, gradient_singular_values):
        with pytest.raises(ValueError, match=f"^layer: the layer is not allowed; {NO_WEIGHT}"):
            function(model[0])


# A run


def test_its_activation_replaces_that_of_the_mlp_from_350m_on_or_as_asked():
    def activates(**values):
        model = build(resolve(run_config(**values)))[0]
        return {block.mlp.activates for block in model.model.layers}

    assert activates() == {True}
    assert activates(method_options={"only_lr_act": True}) == {False}
    assert activates(method_options={"only_lr_act": True}, target="q_proj") == {True}
    for size, alone in (("60m", False), ("130m", False), ("350m", True), ("1b", True)):
        options = resolve(run_config(model=size, vocab_size=None)).method_options
        assert options["only_lr_act"] is alone


@pytest.mark.parametrize("only", [False, True])
def test_the_model_computes_what_its_equations_say(only):
    config = resolve(run_config(method_options={"only_lr_act": only}))
    model = build(config)[0].double()
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 4, 32, dtype=torch.float64)

    def linear(layer, x):
        return F.silu(x @ layer.A.T) @ layer.B.T

    gate, up = linear(mlp.gate_proj, x), linear(mlp.up_proj, x)
    expected = linear(mlp.down_proj, (gate if only else F.silu(gate)) * up)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"refactor_every": 5}, "refactor_every"),
        ({"init": "spectral"}, "init"),
        ({"init": "kaiming"}, "init"),
        ({"method_options": {"alpha": 2.0}}, "method_options"),
        ({"method_options": {"merge_every": 2}}, "method_options"),
        ({"method_options": {"recompute": True}, "target": "mlp"}, "method_options.recompute"),
        ({"method_options": {"recompute": True}, "activation_checkpointing": True},
         "method_options.recompute"),
    ],
)  # fmt: skip
def test_what_it_can_not_do_is_refused_in_one_line(values, field):
    with pytest.raises(InputError, match=f"^{field}: ") as caught:
        resolve(run_config(**values))
    assert "\n" not in str(caught.value)


def test_a_method_of_ones_own_has_its_layers_without_a_scale():
    lab.register_method("mine-cola", layers="cola")
    try:
        model, _ = build(resolve(run_config(method="mine-cola")))
        assert isinstance(model.model.layers[0].mlp.up_proj, ColaLinear)
    finally:
        del lab.METHODS["mine-cola"]


# CoLA-M


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
def test_gradients_of_recomputed_activations_are_the_same_bits(precision, only):
    def found(recompute):
        options = {"recompute": recompute, "only_lr_act": only}
        return loss_and_gradients(run_config(precision=precision, method_options=options))

    for ours, kept in zip(found(True), found(False), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize(
    "options", [{}, {"only_lr_act": True}, {"recompute": True}, {"checkpointed": True}]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
def test_activations_follow_their_formula_to_the_byte(precision, options):
    options = dict(options)
    config = run_config(
        precision=precision, gradient_accumulation=2, vocab_size=64,
        activation_checkpointing=options.pop("checkpointed", False), method_options=options,
    )  # fmt: skip
    assert simulate(config).steps["next"].kept.activations == activation_bytes(resolve(config))


def test_recomputing_keeps_a_fifth_of_the_activations_at_60m(monkeypatch):
    # heads of 64 keep float32 sums on some CPUs
    monkeypatch.setattr("lowrank_lab.kernels.operators.largest_bf16_head", lambda: 32)

    def kept(**options):
        config = run_config(model="60m", precision="bf16", method_options=options)
        return activation_bytes(resolve(config))

    d, i, r, layers, tokens = 512, 1376, 128, 8, 4 * 16
    assert kept() - kept(recompute=True) == 2 * layers * tokens * (6 * d + 4 * i + 2 + 7 * r)
    assert kept(recompute=True) < 0.22 * kept()
